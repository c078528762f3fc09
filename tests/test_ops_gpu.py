"""The ConvLSTM's Pallas kernels, interpreted except on a GPU, against the plain equations, in value and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regnet_flax import create_model
from regnet_flax.models.ops import GPU, PLAIN


def cell(ops, weights, x, h, c):
    """Returns H' and C'."""
    return tuple(a.astype(x.dtype) for a in ops.lstm_step(x, (h, c), weights)[0])


def arrays(height, width, n, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    images = [jnp.asarray(rng.normal(size=(2, height, width, n)), dtype) for _ in range(5)]
    weights = [jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((2, 4, n), (3, 3, 4, n), (4, n))]
    return images[:3], tuple(weights), tuple(images[3:])


# Powers of two that fill several programs, and other sizes; one program per image, where sums have the shape of images,
# or one pixel.
SIZES = [(16, 16, 16), (5, 7, 3), (4, 4, 4), (1, 1, 8), (9, 4, 5), (2, 4, 5)]


# Two programs per image, and neither pixels nor channels fill them.
@pytest.mark.parametrize(
    "height, width, n", [(5, 7, 20), *(pytest.param(*size, marks=pytest.mark.thorough) for size in SIZES)]
)
def test_step(height, width, n):
    images, weights, d = arrays(height, width, n)

    @functools.partial(jax.jit, static_argnums=0)
    def values_and_gradients(ops):
        state, pull = jax.vjp(functools.partial(cell, ops), weights, *images)
        return jax.tree.leaves((state, pull(d)))

    pairs = [*zip(values_and_gradients(GPU), values_and_gradients(PLAIN), strict=True)]
    assert len(pairs) == 2 + 3 + 3
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6 * float(jnp.abs(b).max()))


@pytest.mark.thorough
def test_bfloat16():
    images, weights, d = arrays(8, 8, 4, jnp.bfloat16)
    found, pull = jax.vjp(functools.partial(cell, GPU), weights, *images)
    wide, wide_pull = jax.vjp(functools.partial(cell, PLAIN), weights, *(a.astype(jnp.float32) for a in images))
    assert all(a.dtype == jnp.bfloat16 for a in found)
    gradients, expected = pull(d), wide_pull(tuple(a.astype(jnp.float32) for a in d))
    assert all(a.dtype == jnp.float32 for a in gradients[0])
    pairs = [*zip(found, wide, strict=True), *zip(*map(jax.tree.leaves, (gradients, expected)), strict=True)]
    for a, b in pairs:
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0.02, atol=0.02 * float(jnp.abs(b).max()))


def test_float64_stays_float64():
    with jax.enable_x64(True):
        images, weights, _ = arrays(3, 4, 2, jnp.float64)
        for found, expected in zip(*(cell(ops, weights, *images) for ops in (GPU, PLAIN)), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_no_images():
    images, weights, _ = arrays(3, 4, 2)
    assert [a.shape for a in cell(GPU, weights, *(a[:0] for a in images))] == [(0, 3, 4, 2)] * 2


@pytest.mark.thorough
def test_a_model():
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)
    plain, fused = (create_model("regnet8_convlstm", width=4, ops=ops) for ops in ("plain", "gpu"))
    variables = jax.jit(functools.partial(plain.init, train=False))(jax.random.key(0), images)
    with jax.default_matmul_precision("highest"):  # a GPU's default is TF32
        found, expected = (jax.jit(functools.partial(m.apply, train=False))(variables, images) for m in (fused, plain))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "dtype, height, width, n, seeds",
    [pytest.param(jnp.float32, 32, 32, 16, 1, marks=pytest.mark.thorough), (jnp.bfloat16, 5, 7, 3, 2)],
)
def test_triton_takes_the_kernels(dtype, height, width, n, seeds):
    """Checks that they can be lowered for a GPU on a machine without one."""
    shapes = [(8, height, width, n)] * 3 + [(2, 4, n), (3, 3, 4, n), (4, n)]

    def loss(x, h, c, *weights):
        h, c = cell(GPU, weights, x, h, c)
        return (h * c).astype(jnp.float32).sum()

    gradient = jax.jit(jax.vmap(jax.grad(loss, range(6))))
    traced = gradient.trace(*(jax.ShapeDtypeStruct((seeds, *shape), dtype) for shape in shapes))
    try:
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    except RuntimeError as error:
        if jax.__version_info__ < (0, 12):
            raise
        pytest.skip(f"JAX asks for the device itself: {error}")
    assert program.count("triton") >= 3
