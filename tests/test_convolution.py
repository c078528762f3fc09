"""The forms that are fast on a CPU against the plain ones, in value and gradient."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from regnet_flax import create_model
from regnet_flax.models import convolution

pytestmark = pytest.mark.core

RTOL = 1e-10  # float64


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def assert_same(tuned, plain, *arguments):
    """Equal in value, and in every gradient along a random direction."""
    expected, plain_vjp = jax.vjp(plain, *arguments)
    found, tuned_vjp = jax.vjp(tuned, *arguments)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=RTOL, atol=RTOL), found, expected)
    direction = jax.tree.map(lambda a: normal(9, *a.shape), expected)
    for a, b in zip(jax.tree.leaves(tuned_vjp(direction)), jax.tree.leaves(plain_vjp(direction)), strict=True):
        np.testing.assert_allclose(a, b, rtol=RTOL, atol=RTOL * float(jnp.abs(b).max()))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size, pad", [(1, 0), (3, 1), (7, 3), (3, 0)])
def test_convolution(size, pad, stride):
    x, kernel = normal(0, 2, 7, 10, 3), normal(1, size, size, 3, 5)
    where = ((stride, stride), ((pad, pad), (pad, pad)))
    assert_same(
        lambda x, k: convolution.conv_general_dilated(x, k, *where),
        lambda x, k: convolution.plain_convolve(x, k, *where),
        x,
        kernel,
    )


def test_convolution_with_other_padding_at_each_side():
    where = ((1, 1), ((0, 2), (2, 1)))
    assert_same(
        lambda x, k: convolution.conv_general_dilated(x, k, *where),
        lambda x, k: convolution.plain_convolve(x, k, *where),
        normal(0, 2, 6, 5, 3),
        normal(1, 3, 3, 3, 4),
    )


@pytest.mark.parametrize("height, width", [(3, 6), (1, 1)])
def test_separable(height, width):
    x, h = (normal(seed, 2, height, width, 5) for seed in range(2))
    assert_same(convolution.separable, convolution.plain_separable, x, h, normal(2, 2, 4, 5), normal(3, 3, 3, 4, 5))


def test_alone_is_a_computation_of_its_own():
    """What is around it is not fused into it: the compiled program calls it, and writes its operand out."""

    def program(wrap, x):
        return wrap(jnp.transpose)(jnp.sin(x)), jnp.sin(x).sum()

    x = normal(0, 64, 64)
    plain, apart = (
        jax.jit(functools.partial(program, wrap)).lower(x).compile() for wrap in (lambda f: f, convolution.alone)
    )
    assert " call(" in apart.as_text() and " call(" not in plain.as_text()
    np.testing.assert_array_equal(apart(x)[0], plain(x)[0])


@pytest.mark.parametrize("tuned", [True, False])
def test_in_a_loop_gradients_are_in_the_form_of_the_library(tuned):
    """In others XLA:CPU has slow loops of its own; outside of a loop it brings them into this one itself."""
    convolve = convolution.conv_general_dilated if tuned else convolution.plain_convolve

    def loss(x, kernel):
        def step(x, _):
            return jnp.tanh(convolve(x, kernel, (1, 1), ((1, 1), (1, 1)))), None

        return lax.scan(step, x, length=3)[0].sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    program = gradient.lower(normal(0, 2, 8, 8, 4), normal(1, 3, 3, 4, 4)).compile().as_text()
    forms = re.findall(r" convolution\(.*dim_labels=([^,]+)", program)
    assert len(forms) == 3
    assert (set(forms) == {"b01f_01io->b01f"}) == tuned


def test_bfloat16_sums_in_float32():
    x, kernel = normal(0, 4, 16, 16, 8).astype(jnp.bfloat16), normal(1, 3, 3, 8, 8).astype(jnp.bfloat16)
    d = normal(2, 4, 16, 16, 8).astype(jnp.bfloat16)
    where = ((1, 1), ((1, 1), (1, 1)))
    found = jax.vjp(lambda k: convolution.conv_general_dilated(x, k, *where), kernel)[1](d)[0]
    wide = [a.astype(jnp.float32) for a in (x, kernel, d)]
    expected = jax.vjp(lambda k: convolution.plain_convolve(wide[0], k, *where), wide[1])[1](wide[2])[0]
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=2**-8, atol=1e-2)


def gradients(name, options, variables, images):
    model = create_model(name, dtype=jnp.float64, **options)

    def loss(params):
        logits, updates = model.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
        return (logits**2).sum(), (logits, updates)

    return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])


@pytest.mark.parametrize(
    "name, options",
    [
        pytest.param("regnet14_convlstm", {}, marks=pytest.mark.slow),
        ("regnet14_convgru", {"unroll": 1}),
        pytest.param("regnet14_convrnn", {"kernel": "dense", "remat": True}, marks=pytest.mark.slow),
    ],
)
def test_whole_models(name, options):
    images, options = normal(3, 4, 8, 8, 3), {"width": 4} | options
    init = jax.jit(functools.partial(create_model(name, dtype=jnp.float64, **options).init, train=False))
    variables = init(jax.random.key(0), images)
    found = gradients(name, options | {"tuned": True}, variables, images)
    expected = gradients(name, options | {"tuned": False}, variables, images)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8 * float(jnp.abs(b).max() + 1e-3))


def test_gradients_without_jit_compile_once():
    arguments = normal(0, 2, 5, 6, 3), normal(1, 2, 5, 6, 3), normal(2, 2, 4, 3), normal(3, 3, 3, 4, 3)
    compiled = []

    def count(event, *_, **__):
        compiled.append(event)

    def loss(x, h, pointwise, kernel):
        y = convolution.conv_general_dilated(x, kernel[:, :, :3], (1, 1), ((1, 1), (1, 1)))
        return y.sum() + convolution.separable(x, h, pointwise, kernel).sum()

    gradient = jax.grad(loss, range(4))
    gradient(*arguments)
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        gradient(*arguments)
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert not [event for event in compiled if "backend_compile" in event]


def test_seeds_together():
    """Under vmap, as seeds that are trained together are."""
    x, kernel = normal(0, 3, 4, 6, 6, 4), normal(1, 3, 3, 3, 4, 4)
    where = ((1, 1), ((1, 1), (1, 1)))
    assert_same(
        jax.vmap(lambda x, k: convolution.conv_general_dilated(x, k, *where)),
        jax.vmap(lambda x, k: convolution.plain_convolve(x, k, *where)),
        x,
        kernel,
    )
    assert_same(
        jax.vmap(convolution.separable),
        jax.vmap(convolution.plain_separable),
        normal(2, 3, 8, 4, 4, 2),
        normal(3, 3, 8, 4, 4, 2),
        normal(4, 3, 2, 3, 2),
        normal(5, 3, 3, 3, 3, 2),
    )


@pytest.mark.parametrize("name", ["resnet8", "regnet8_convlstm"])
def test_half_the_memory(name):
    """Temporaries of the training step, by the compiled step's own analysis."""
    images = jnp.zeros((64, 32, 32, 3), jnp.float32)

    def temporaries(tuned):
        model = create_model(name, tuned=tuned)
        variables = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)

        def loss(params, stats, images):
            return model.apply({"params": params, "batch_stats": stats}, images, train=True, mutable=["batch_stats"])[
                0
            ].sum()

        compiled = jax.jit(jax.grad(loss)).lower(variables["params"], variables["batch_stats"], images).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(True) < 0.5 * temporaries(False)
