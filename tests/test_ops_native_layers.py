"""The native convolutions and batch normalisation against the plain equations, in float64 where the digits count."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import close, halves
from regnet_flax import create_model
from regnet_flax.models.ops import CPU, PLAIN, native_library

pytestmark = [
    pytest.mark.core,
    pytest.mark.skipif(not native_library.available(), reason="there is no C++ compiler here"),
]

# Images, height, width, inputs, outputs, kernel, stride, zeros above and below: one pixel, no image, a stem, odd sizes,
# groups of one, two and four vectors of outputs, several blocks of rows (of a copy, and in place), rows of long and of
# short tiles, no padding, much of it, an uneven one, less than the image, no channels.
CONVOLUTIONS = [
    (1, 1, 1, 1, 1, 3, 1, (1, 1)),
    (0, 4, 4, 3, 5, 3, 1, (1, 1)),
    (3, 9, 7, 3, 16, 3, 1, (1, 1)),
    (2, 7, 9, 20, 33, 3, 2, (1, 1)),
    (2, 8, 8, 16, 32, 1, 2, (0, 0)),
    (2, 4, 4, 64, 64, 3, 1, (1, 1)),
    (1, 66, 70, 40, 24, 3, 1, (1, 1)),
    (1, 90, 68, 5, 16, 3, 1, (1, 1)),
    (1, 3, 13, 8, 16, 3, 1, (1, 1)),
    (2, 2, 20, 16, 32, 3, 1, (1, 1)),
    (1, 14, 15, 3, 64, 7, 2, (3, 3)),
    (2, 6, 6, 4, 4, 5, 1, (0, 0)),
    (2, 3, 3, 4, 4, 1, 1, (2, 2)),
    (2, 6, 5, 4, 4, 3, 2, (0, 1)),
    (2, 12, 1, 4, 4, 2, 1, (-8, 20)),
    (2, 3, 3, 0, 4, 3, 1, (1, 1)),
]


# Images, height, width, inputs, outputs, stride, ReLU: few images; many; a stride; several blocks of rows.
NORMALIZED = [
    (1, 6, 5, 16, 16, 1, True),
    (70, 6, 7, 5, 5, 1, True),
    (70, 9, 7, 20, 4, 2, False),
    (8, 44, 70, 40, 5, 1, False),
]


def convolution(ops, x, kernel, stride=1, padding=(1, 1)):
    return ops.array(ops.conv(x, kernel, (stride, stride), (padding, padding)))


def normalized(ops, x, kernel, scale, bias, stride=1, **options):
    """A convolution and its batch normalisation, whose gradients are computed together."""
    return ops.batch_norm(ops.conv(x, kernel, (stride, stride), ((1, 1),) * 2), scale, bias, **options)


def normalized_array(ops, *arrays, **options):
    y, *statistics = normalized(ops, *arrays, **options)
    return ops.array(y), jax.lax.stop_gradient(statistics)


def block(ops, x, y, scale, bias, first, kernel, axis_name=None):
    """A convolution of two arrays, one normalised with a ReLU, after a convolution of its own, and one without."""
    x, mean, variance = normalized(ops, x, first, scale, bias, relu=True, axis_name=axis_name)
    plain, *_ = ops.batch_norm(y, bias, scale, axis_name=axis_name)
    statistics = jax.lax.stop_gradient((mean, variance))
    return ops.array(ops.conv(ops.concatenate(x, plain), kernel, (1, 1), ((1, 1),) * 2)), statistics


def evaluated(ops, x, y, mean, variance, scale, bias, first, second):
    """A block as evaluation has it: its convolutions normalise, add the shortcut and apply the ReLU as they write."""
    a = ops.normalize(ops.conv(x, first, (2, 2), ((1, 1),) * 2), mean, jnp.exp(variance), scale, bias, relu=True)
    b = ops.conv(ops.concatenate(a, y), second, (1, 1), ((1, 1),) * 2)
    b = ops.normalize(b, bias, jnp.exp(scale), mean, variance, epsilon=1e-3)
    return ops.add_relu(ops.array(a), b)


def both(function, arrays, seed=0):
    """The value, and the gradients of a sum over it in which each element has its own weight."""
    value, vjp, rest = jax.vjp(lambda *a: split(function(*a)), *arrays, has_aux=True)
    d = np.random.default_rng(seed).normal(size=value.shape)
    return value, rest, vjp(jnp.asarray(d, value.dtype))


def split(result):
    return result if isinstance(result, tuple) else (result, ())


def normal(rng, *shape, scale=1.0, mean=0.0):
    return (rng.normal(size=shape) * scale + mean).astype(np.float32)


def block_arrays(channels=5, seed=0, images=4):
    rng = np.random.default_rng(seed)
    x, y = (normal(rng, images, 5, 3, channels, mean=mean) for mean in (1, 20))
    scale, bias = (normal(rng, channels, mean=1) for _ in range(2))
    first, kernel = (normal(rng, 3, 3, *c, scale=0.3) for c in ((channels, channels), (2 * channels, 6)))
    return x, y, scale, bias, first, kernel


def normalized_arrays(images, height, width, inputs, outputs):
    rng = np.random.default_rng(0)
    x, kernel = normal(rng, images, height, width, inputs), normal(rng, 3, 3, inputs, outputs)
    # The ReLU keeps or stops whole channels: in bfloat16, rounding must not take an element across its kink.
    scale, bias = normal(rng, outputs, scale=0.1), np.where(np.arange(outputs) % 2, 1, -1).astype(np.float32)
    return x, kernel, scale, bias


def evaluated_arrays(channels=5, seed=0):
    rng = np.random.default_rng(seed)
    images = normal(rng, 4, 9, 5, channels), normal(rng, 4, 5, 3, channels)
    kernels = normal(rng, 3, 3, channels, channels, scale=0.3), normal(rng, 3, 3, 2 * channels, channels, scale=0.3)
    return *images, *(normal(rng, channels) for _ in range(4)), *kernels


def cases():
    rng = np.random.default_rng(1)
    found = []
    for n, height, width, inputs, outputs, size, stride, padding in CONVOLUTIONS:
        arrays = normal(rng, n, height, width, inputs), normal(rng, size, size, inputs, outputs)
        found.append((functools.partial(convolution, stride=stride, padding=padding), arrays))
    for *shape, stride, relu in NORMALIZED:
        found.append((functools.partial(normalized_array, stride=stride, relu=relu), normalized_arrays(*shape)))
    # With other seeds, bfloat16 rounds across the kink of a ReLU.
    found += [(block, block_arrays(channels, seed=2)) for channels in (5, 16, 20)]
    return found + [(evaluated, evaluated_arrays(channels)) for channels in (5, 16, 20, 32)]


def run(ops, arrays):
    return [both(functools.partial(f, ops), a) for (f, _), a in zip(cases(), arrays, strict=True)]


def test_values_and_gradients():
    """Of float32; and of bfloat16 images and kernels, whose sums are float32 too."""
    arrays = [a for _, a in cases()]
    narrow = [tuple(a.astype(jnp.bfloat16) if a.ndim == 4 else a for a in case) for case in arrays]
    program = jax.jit(functools.partial(run, CPU)).lower(arrays)
    names = ["convolution", "input_gradient", "filter_gradient", "convolution_gradients"]
    names += ["moments", "norm_gradient_sums", "norm_gradient"]
    assert all(f"regnet_flax_{name}" in program.as_text() for name in names)
    found, narrow_found = program.compile()(arrays), jax.jit(functools.partial(run, CPU))(narrow)
    with jax.enable_x64(True):
        wide, narrow_wide = (jax.tree.map(lambda a: np.asarray(a, np.float64), c) for c in (arrays, narrow))
        reference = jax.jit(functools.partial(run, PLAIN))
        expected, narrow_expected = reference(wide), reference(narrow_wide)
    count = len(CONVOLUTIONS)
    close(found[:count], expected[:count], 1e-6)
    close(found[count:], expected[count:], 4e-6)  # float32 in the normalisation: of X − mean, too
    close(narrow_found, narrow_expected, 0.03)
    assert all(a.dtype == jnp.bfloat16 for _, _, (x, *_) in narrow_found for a in [x])


def test_a_normalisation_that_rounds():
    """From float32 to bfloat16: the convolution reads what it is given."""
    x, kernel = jnp.ones((2, 3, 3, 4)), jnp.ones((3, 3, 4, 5), jnp.bfloat16)

    def rounded(ops, x, kernel):
        y, *_ = ops.batch_norm(x, jnp.ones(4), jnp.zeros(4), dtype=jnp.bfloat16)
        return ops.array(ops.conv(y, kernel, (1, 1), "SAME"))

    found, expected = (
        jax.eval_shape(functools.partial(both, functools.partial(rounded, ops)), (x, kernel)) for ops in (CPU, PLAIN)
    )
    assert found == expected


@pytest.mark.parametrize("relu", [False, True])
def test_batch_norm_far_from_zero(relu):
    """Mean 1,000, deviation 1: E[x²] − E[x]² would have no digit left."""
    rng = np.random.default_rng(0)
    x, d = normal(rng, 40, 9, 5, 3, mean=1000), normal(rng, 40, 9, 5, 3)
    scale, bias = normal(rng, 3), normal(rng, 3)

    def everything(ops, x, d, scale, bias):
        def function(*arrays):
            y, *statistics = ops.batch_norm(*arrays, relu=relu)
            return ops.array(y), statistics

        y, vjp, statistics = jax.vjp(function, x, scale, bias, has_aux=True)
        return y, statistics, vjp(d)

    found = jax.jit(functools.partial(everything, CPU))(x, d, scale, bias)
    with jax.enable_x64(True):
        wide = [np.asarray(a, np.float64) for a in (x, d, scale, bias)]
        expected = jax.jit(functools.partial(everything, PLAIN))(*wide)
    close(found[1], expected[1], 1e-6)
    close((found[0], found[2]), (expected[0], expected[2]), 1e-4)


@pytest.mark.parametrize("channels", [5, 16, 20, 32])
def test_values_of_evaluation(channels):
    """Without a gradient, whose forward pass would round after each step in bfloat16; this rounds what it writes."""
    arrays = evaluated_arrays(channels)
    narrow = tuple(a.astype(jnp.bfloat16) if a.ndim == 4 else a for a in arrays)
    found, narrow_found = (jax.jit(functools.partial(evaluated, CPU))(*a) for a in (arrays, narrow))
    with jax.enable_x64(True):
        wide, narrow_wide = (jax.tree.map(lambda a: np.asarray(a, np.float64), a) for a in (arrays, narrow))
        expected, narrow_expected = (evaluated(PLAIN, *a) for a in (wide, narrow_wide))
    close(found, expected, 2e-6)
    close(narrow_found, narrow_expected, 0.02)
    assert narrow_found.dtype == jnp.bfloat16


def test_evaluation_has_no_other_passes_over_the_images():
    """XLA does nothing of what follows a convolution, nor in a network, nor with nn.remat."""
    arrays = evaluated_arrays()
    program = jax.jit(functools.partial(evaluated, CPU)).lower(*arrays).compile().as_text()
    assert program.count('custom_call_target="regnet_flax_convolution"') == 2 and "maximum(" not in program
    for options in ({}, {"remat": True}):
        model = create_model("resnet8", width=4, **options)
        images = jnp.ones((2, 8, 8, 3))
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
        program = jax.jit(model.apply).lower(variables, images).compile().as_text()
        assert program.count('custom_call_target="regnet_flax_convolution"') == 9 and "maximum(" not in program


def test_evaluation_outside_a_compiled_program():
    """Each convolution runs once, and what it gives can be used more than once, and in another trace."""
    arrays = evaluated_arrays()
    close(evaluated(CPU, *arrays), evaluated(PLAIN, *arrays), 1e-5)

    def twice(ops, x, *arrays, read_first=False):
        *vectors, first, _ = arrays[1:]
        y = ops.normalize(ops.conv(x, first, (1, 1), "SAME"), *vectors)
        if read_first:
            x += ops.array(y)
        inner, _ = jax.lax.scan(lambda carry, _: (carry + ops.array(y), None), x, length=2)
        return inner + ops.add_relu(x, y) + ops.array(ops.conv(ops.concatenate(x, y), arrays[-1], (1, 1), "SAME"))

    for read_first in (False, True):
        found, expected = (
            jax.jit(functools.partial(twice, ops, read_first=read_first))(*arrays) for ops in (CPU, PLAIN)
        )
        close(found, expected, 1e-5)
    x = CPU.conv(arrays[0], arrays[-2], (1, 1), "SAME")
    assert x.array is x.array and jax.tree.map(lambda a: a, x).array is x.array


def test_flax_can_list_and_capture_the_layers():
    model, images = create_model("resnet8", width=4, ops="cpu"), jnp.ones((2, 8, 8, 3))
    assert "conv1" in model.tabulate(jax.random.key(0), images)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    _, captured = model.apply(variables, images, capture_intermediates=True, mutable=["intermediates"])
    assert "stage3" in captured["intermediates"]


def test_frozen_statistics_in_training_keep_each_array_once():
    """A gradient keeps what a convolution gives, not its normalisation beside it."""
    model = create_model("resnet8", width=16, ops="cpu", frozen_batch_stats=True)
    images = jnp.ones((16, 32, 32, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)

    def memory(train):
        loss = lambda v: model.apply(v, images, train=train).sum()  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(variables).compile().memory_analysis().temp_size_in_bytes

    assert memory(True) < 0.9 * memory(False)


def test_second_derivatives_and_transformations_of_evaluation():
    arrays, others = evaluated_arrays(), evaluated_arrays(seed=1)
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), arrays, others)

    def everything(ops):
        def gradients(*arrays):
            return both(functools.partial(evaluated, ops), arrays)[2]

        return {
            "forward over reverse": jax.jvp(gradients, arrays, others)[1],
            "all by vmap": jax.vmap(lambda *a: (evaluated(ops, *a), gradients(*a)))(*stacked),
            "kernels by vmap": jax.vmap(lambda k: evaluated(ops, *arrays[:-1], k))(stacked[-1]),
            "statistics by vmap": jax.vmap(lambda m: evaluated(ops, *arrays[:2], m, *arrays[3:]))(stacked[2]),
        }

    close(jax.jit(everything, static_argnums=0)(CPU), jax.jit(everything, static_argnums=0)(PLAIN), 1e-4)


def test_second_derivatives_and_transformations():
    arrays, others = block_arrays(), block_arrays(seed=1)
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), arrays, others)

    def everything(ops):
        both_of = functools.partial(both, functools.partial(block, ops))
        x, y, *rest = arrays

        def gradients(*arrays):
            return both_of(arrays)[2]

        def repeated(x, kernel):
            def body(x, _):
                out, _ = block(ops, x, y, *rest[:3], kernel)
                return out[..., :5], None

            return jax.lax.scan(jax.checkpoint(body), x, length=2)[0].sum()

        return {
            "forward over reverse": jax.jvp(gradients, arrays, others)[1],
            "reverse over reverse": jax.vjp(gradients, *arrays)[1](gradients(*others)),
            "all by vmap": jax.vmap(lambda *a: both_of(a))(*stacked),
            "kernels by vmap of vmap": jax.vmap(jax.vmap(lambda k: both_of((x, y, *rest[:3], k))))(
                jnp.stack([jnp.stack([rest[3], -rest[3], rest[3] / 2])] * 2)
            ),
            "scan and checkpoint": jax.grad(repeated, (0, 1))(x, rest[3]),
        }

    close(jax.jit(everything, static_argnums=0)(CPU), jax.jit(everything, static_argnums=0)(PLAIN), 1e-4)


def test_devices():
    """By pmap, the statistics of both devices' images."""
    x, y, *weights = block_arrays()
    images = jax.tree.map(halves, (x, y))

    def gradients(ops):
        def one(images, weights):
            function = functools.partial(block, ops, axis_name="batch")
            return both(function, (*images, *weights))

        by_device = jax.pmap(one, axis_name="batch", in_axes=(0, None), devices=jax.devices()[:2])
        return by_device(images, weights)

    close(gradients(CPU), gradients(PLAIN), 1e-4)


def test_nan_stays_where_it_is():
    """It spreads to the pixels whose taps see it, and by batch normalisation over its channel."""
    rng = np.random.default_rng(0)
    x, kernel = normal(rng, 3, 8, 9, 4), normal(rng, 3, 3, 4, 5)
    x[1, 4, 8, 2] = np.nan
    found, expected = (
        jax.jit(lambda x, k, ops=ops: both(functools.partial(convolution, ops), (x, k)))(x, kernel)
        for ops in (CPU, PLAIN)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
    assert np.isnan(found[0]).sum() == 6 * 5
    y, mean, variance = CPU.batch_norm(x, *[np.ones(4, np.float32)] * 2)
    assert np.isnan(convolution(CPU, y, kernel)).all()
    for a in (mean, variance):
        np.testing.assert_array_equal(np.isnan(a), [False, False, True, False])
    arrays = x, kernel, *[np.ones(5, np.float32)] * 2
    _, statistics, (*gradients, _) = both(functools.partial(normalized_array, CPU), arrays)
    assert all(np.isnan(a).all() for a in jax.tree.leaves((statistics, gradients)))
    _, *rest = evaluated_arrays()[1:]
    found, expected = (
        jax.jit(functools.partial(evaluated, ops))(np.pad(x[..., [0, 1, 2, 3, 3]], ((0, 1), *[(0, 0)] * 3)), *a)
        for ops, a in ((ops, (np.ones((4, 4, 5, 5), np.float32), *rest)) for ops in (CPU, PLAIN))
    )
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    assert np.isnan(found).any() and not np.isnan(found).all()


def test_what_it_cannot_do_is_computed_by_the_plain_form():
    x, kernel = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4, 4))
    grouped = jnp.ones((3, 3, 2, 4))

    def program(x, kernel, strides=(1, 1), padding="SAME", **options):
        function = lambda x, k: CPU.array(CPU.conv(x, k, strides, padding, **options))  # noqa: E731
        return str(jax.make_jaxpr(function)(x, kernel))

    assert "regnet_flax_" in program(x, kernel)
    for other in (
        program(x, kernel, (3, 3)),
        program(x, kernel, (1, 2)),
        program(x, kernel, rhs_dilation=(2, 2)),
        program(x, grouped, feature_group_count=2),
        program(x, kernel, padding=((1, 1), (-1, 3))),
        program(x[..., :0], kernel[:, :, :0]),
    ):
        assert "regnet_flax_" not in other
    with jax.enable_x64(True):
        assert "regnet_flax_" not in program(x.astype(jnp.float64), kernel.astype(jnp.float64))
