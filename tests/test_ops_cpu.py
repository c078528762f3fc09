"""What is special about the CPU's arithmetic: sizes, the program's form, memory, sums; test_ops compares the rest."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from helpers import random_variables
from regnet_flax import create_model
from regnet_flax.models.layers import BatchNorm
from regnet_flax.models.ops import CPU, PLAIN, cpu, cpu_batch_norm

RTOL = 1e-10  # float64


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def value_and_gradients(call, *arguments):
    """Returns the value, and every gradient along a random direction."""
    found, vjp = jax.vjp(call, *arguments)
    return found, vjp(jax.tree.map(lambda a: normal(9, *a.shape).astype(a.dtype), found))


def assert_same(found, expected, rtol=RTOL):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(jnp.abs(b).max()))


WHERE = [
    *(((s, s), ((p, p), (p, p)), k) for s in (1, 2) for k, p in ((1, 0), (3, 1), (7, 3), (3, 0))),
    ((1, 1), ((0, 2), (2, 1)), 3),
    ((2, 1), ((3, 0), (0, 1)), 3),
]


def test_convolutions_of_every_size():
    x = normal(0, 2, 7, 10, 3)

    def run(ops):
        return [
            value_and_gradients(
                lambda x, k, where=where: ops.array(ops.conv(x, k, *where)), x, normal(1, size, size, 3, 5)
            )
            for *where, size in WHERE
        ]

    assert_same(*(jax.jit(run, static_argnums=0)(ops) for ops in (CPU, PLAIN)))


def test_separable_convolutions_of_one_pixel_and_others():
    def run(ops):
        images = [[normal(seed, 2, *size, 5) for seed in range(2)] for size in ((3, 6), (1, 1))]
        return [value_and_gradients(ops.separable, *pair, normal(2, 2, 4, 5), normal(3, 3, 3, 4, 5)) for pair in images]

    assert_same(*(jax.jit(run, static_argnums=0)(ops) for ops in (CPU, PLAIN)))


def test_no_inline_is_a_computation_of_its_own():
    """Surrounding operations are not fused into it: the compiled program calls it, and writes out its operand."""

    def program(wrap, x):
        return wrap(jnp.transpose)(jnp.sin(x)), jnp.sin(x).sum()

    x = normal(0, 64, 64)
    plain, apart = (
        jax.jit(functools.partial(program, wrap)).lower(x).compile() for wrap in (lambda f: f, cpu.no_inline)
    )
    assert " call(" in apart.as_text() and " call(" not in plain.as_text()
    np.testing.assert_array_equal(apart(x)[0], plain(x)[0])


@pytest.mark.parametrize("ops", [CPU, PLAIN], ids=lambda ops: ops.name)
def test_in_a_loop_gradients_are_in_the_form_of_the_library(ops):
    """For other forms XLA:CPU uses slow loops; outside a loop it converts them to this form itself."""

    def loss(x, kernel):
        def step(x, _):
            return jnp.tanh(ops.array(ops.conv(x, kernel, (1, 1), ((1, 1), (1, 1))))), None

        return lax.scan(step, x, length=3)[0].sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    program = gradient.lower(normal(0, 2, 8, 8, 4), normal(1, 3, 3, 4, 4)).compile().as_text()
    forms = re.findall(r" convolution\(.*dim_labels=([^,]+)", program)
    assert len(forms) == 3
    assert (set(forms) == {"b01f_01io->b01f"}) == (ops is CPU)


def test_bfloat16_sums_in_float32():
    x, kernel = normal(0, 4, 16, 16, 8).astype(jnp.bfloat16), normal(1, 3, 3, 8, 8).astype(jnp.bfloat16)
    d = normal(2, 4, 16, 16, 8).astype(jnp.bfloat16)
    where = ((1, 1), ((1, 1), (1, 1)))
    found = jax.vjp(lambda k: CPU.array(CPU.conv(x, k, *where)), kernel)[1](d)[0]
    wide = [a.astype(jnp.float32) for a in (x, kernel, d)]
    expected = jax.vjp(lambda k: PLAIN.conv(wide[0], k, *where), wide[1])[1](wide[2])[0]
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=2**-8, atol=1e-2)


def gradients(model, variables, images):
    def loss(params):
        logits, updates = model.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
        return (logits**2).sum(), (logits, updates)

    return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])


@pytest.mark.parametrize(
    "name, options",
    [
        pytest.param("regnet14_convlstm", {}, marks=pytest.mark.thorough),
        pytest.param("regnet14_convgru", {"unroll": 1}, marks=pytest.mark.thorough),
        pytest.param("regnet14_convrnn", {"kernel": "dense", "remat": True}, marks=pytest.mark.thorough),
    ],
)
def test_whole_models(name, options):
    images = normal(3, 4, 8, 8, 3)
    cpu, plain = (
        create_model(name, dtype=jnp.float64, width=4, ops=ops, **options).clone(stage_sizes=(3, 1))
        for ops in ("cpu", "plain")
    )
    variables = random_variables(plain, images)
    found, expected = (gradients(model, variables, images) for model in (cpu, plain))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8 * float(jnp.abs(b).max() + 1e-3))


def test_gradients_without_jit_compile_once():
    arguments = normal(0, 2, 5, 6, 3), normal(1, 2, 5, 6, 3), normal(2, 2, 4, 3), normal(3, 3, 3, 4, 3)
    compiled = []

    def count(event, *_, **__):
        compiled.append(event)

    def loss(x, h, pointwise, kernel):
        y = CPU.array(CPU.conv(x, kernel[:, :, :3], (1, 1), ((1, 1), (1, 1))))
        return y.sum() + CPU.separable(x, h, pointwise, kernel).sum()

    gradient = jax.grad(loss, range(4))
    gradient(*arguments)
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        gradient(*arguments)
        assert not [event for event in compiled if "backend_compile" in event]
        jax.jit(lambda x: 2 * x)(1.0)
        assert [event for event in compiled if "backend_compile" in event], "JAX calls it otherwise"
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


@pytest.mark.parametrize("name", [pytest.param("resnet8", marks=pytest.mark.thorough), "regnet8_convlstm"])
def test_half_the_memory(name):
    """Checks the training step's temporaries, from the compiled step's own analysis."""
    images = jnp.zeros((64, 32, 32, 3), jnp.float32)

    def temporaries(ops):
        model = create_model(name, ops=ops)
        variables = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)

        def loss(params, stats, images):
            return model.apply({"params": params, "batch_stats": stats}, images, train=True, mutable=["batch_stats"])[
                0
            ].sum()

        compiled = jax.jit(jax.grad(loss)).lower(variables["params"], variables["batch_stats"], images).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries("cpu") < 0.5 * temporaries("plain")


def trained(make, x, direction, **options):
    """Returns a batch normalisation's output, the gradients of X, scale and bias, and the new statistics."""
    n = x.shape[-1]
    params = {"scale": normal(1, n), "bias": normal(2, n)}
    statistics = {"mean": normal(3, n), "var": 1 + normal(4, n) ** 2}
    module = make(use_running_average=False, **options)

    def loss(x, params):
        y, updated = module.apply({"params": params, "batch_stats": statistics}, x, mutable=["batch_stats"])
        return (y * direction).sum(), (y, updated)

    gradients, (y, updated) = jax.grad(loss, argnums=(0, 1), has_aux=True)(x, params)
    return {"y": y, "gradients": gradients, "statistics": updated}


@pytest.mark.parametrize("ops", [CPU, PLAIN], ids=lambda ops: ops.name)
def test_batch_normalisation_is_flax_s(ops):
    x, direction = 3 + 2 * normal(0, 4, 5, 6, 3), normal(9, 4, 5, 6, 3)
    flax = functools.partial(nn.BatchNorm, momentum=0.9, use_fast_variance=False)
    found, expected = (
        jax.jit(functools.partial(trained, make, dtype=jnp.float64))(x, direction)
        for make in (functools.partial(BatchNorm, ops=ops), flax)
    )
    assert_same(found, expected, 1e-12)


def test_far_from_zero_float32_keeps_its_digits():
    """The mean is a thousand times the deviation, so E[x²] − E[x]² would have no correct digit."""
    x = 1000 + normal(0, 8, 8, 8, 4).astype(jnp.float32)
    wide = np.asarray(x, np.float64)
    for ops in (CPU, PLAIN):
        _, mean, variance = ops.batch_norm(x, jnp.ones(4, jnp.float32), jnp.zeros(4, jnp.float32))
        np.testing.assert_allclose(mean, wide.mean((0, 1, 2)), rtol=1e-6)
        np.testing.assert_allclose(variance, wide.var((0, 1, 2)), rtol=1e-4)


def test_running_statistics_are_used_and_kept_in_evaluation():
    x = normal(0, 2, 3, 3, 2).astype(jnp.float32)
    for ops in (CPU, PLAIN):
        module = BatchNorm(use_running_average=True, relu=True, ops=ops)
        variables = module.init(jax.random.key(0), x)
        y, updated = module.apply(variables, x, mutable=["batch_stats"])
        np.testing.assert_allclose(y, np.maximum(x, 0) / np.sqrt(1 + 1e-5), rtol=1e-6)
        assert_same(updated["batch_stats"], variables["batch_stats"], 0)


def test_bfloat16_statistics_are_float32():
    x = normal(0, 16, 16, 16, 4).astype(jnp.bfloat16)
    found, expected = (trained(functools.partial(BatchNorm, ops=o), x, x, dtype=jnp.bfloat16) for o in (CPU, PLAIN))
    assert found["y"].dtype == found["gradients"][0].dtype == jnp.bfloat16
    assert_same(found["statistics"], expected["statistics"], 1e-5)


def test_a_convolution_keeps_nothing_but_what_was_normalised():
    x, kernel = normal(0, 4, 6, 6, 3), normal(1, 3, 3, 3, 5)

    def convolved(make, x, scale, bias):
        y, *_ = CPU.batch_norm(x, scale, bias, relu=True)
        return CPU.array(CPU.conv(make(y), kernel, (1, 1), ((1, 1), (1, 1))))

    for make, kept in ((lambda y: y, 1), (CPU.array, 2)):
        residuals = jax.tree.leaves(jax.vjp(functools.partial(convolved, make), x, normal(2, 3), normal(3, 3))[1])
        assert len({id(a) for a in residuals if a.shape == x.shape}) == kept


def test_the_gradient_of_add_relu_is_0_where_the_sum_is():
    x = normal(0, 2, 3, 3, 4)
    _, vjp = jax.vjp(cpu_batch_norm.add_relu, x, -x)
    assert not any(map(np.any, vjp(x)))
