"""The batch normalisation that is fast on a CPU against Flax's, in value, statistics and gradient."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regnet_flax.models import convolution, normalization
from regnet_flax.models.normalization import BatchNorm

pytestmark = pytest.mark.core

FIELDS = {"use_running_average": False}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.result_type(float))


def trained(x, direction, axis_name=None, **fields):
    """The output, the gradients of X, scale and bias along a direction, and the new statistics."""
    n = x.shape[-1]
    params = {"scale": normal(1, n), "bias": normal(2, n)}
    statistics = {"mean": normal(3, n), "var": 1 + normal(4, n) ** 2}
    module = BatchNorm(axis_name=axis_name, **FIELDS | fields)

    def loss(x, params):
        variables = {"params": params, "batch_stats": statistics}
        y, updated = module.apply(variables, x, mutable=["batch_stats"])
        return (y * direction).sum(), (y, updated)

    gradients, (y, updated) = jax.grad(loss, argnums=(0, 1), has_aux=True)(x, params)
    return {"y": y, "x": gradients[0], "params": gradients[1], "statistics": updated}


def assert_same(found, expected, tolerance):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * float(jnp.abs(b).max()))


@pytest.mark.parametrize("relu", [False, True])
def test_is_flax_s(relu):
    with jax.enable_x64(True):
        x, direction = 3 + 2 * normal(0, 4, 5, 6, 3), normal(9, 4, 5, 6, 3)
        fields = {"relu": relu, "dtype": jnp.float64}
        found, expected = (jax.jit(functools.partial(trained, tuned=t, **fields))(x, direction) for t in (True, False))
        assert_same(found, expected, 1e-12)
        assert not relu or float(found["y"].min()) == 0


def test_far_from_zero_float32_keeps_its_digits():
    """A mean a thousand times the deviation, at which E[x²] − E[x]² has no digit left."""
    x = 1000 + normal(0, 8, 8, 8, 4)
    _, mean, variance = normalization.normalize(x, jnp.ones(4), jnp.zeros(4), 1e-5, False, jnp.float32, None)
    wide = np.asarray(x, np.float64)
    np.testing.assert_allclose(mean, wide.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(variance, wide.var((0, 1, 2)), rtol=1e-4)


def test_bfloat16_statistics_and_sums_are_float32():
    x = normal(0, 16, 16, 16, 4).astype(jnp.bfloat16)
    fields = {"relu": True, "dtype": jnp.bfloat16}
    direction = jnp.ones(x.shape, jnp.bfloat16)
    found, expected = (trained(x, direction, tuned=t, **fields) for t in (True, False))
    assert found["y"].dtype == found["x"].dtype == jnp.bfloat16
    assert_same(found["statistics"], expected["statistics"], 1e-5)
    assert_same(found["params"], expected["params"], 1e-2)


def test_statistics_over_devices():
    """Two devices with half of the batch each give what one gives with all of it."""
    with jax.enable_x64(True):
        x, direction = normal(0, 4, 3, 3, 2), normal(9, 4, 3, 3, 2)
        fields = {"relu": True, "dtype": jnp.float64, "tuned": True}
        whole = trained(x, direction, **fields)
        step = functools.partial(trained, axis_name="batch", **fields)
        halves = jax.pmap(step, axis_name="batch", devices=jax.devices()[:2])(
            *(a.reshape(2, 2, *a.shape[1:]) for a in (x, direction))
        )
        for name in ("y", "x"):
            assert_same(halves[name].reshape(x.shape), whole[name], 1e-12)
        assert_same(jax.tree.map(lambda a: a.sum(0), halves["params"]), whole["params"], 1e-12)
        for device in range(2):
            one = jax.tree.map(operator.itemgetter(device), halves["statistics"])
            assert_same(one, whole["statistics"], 1e-12)


def test_running_statistics_are_used_and_kept_in_evaluation():
    x = normal(0, 2, 3, 3, 2)
    for tuned in (False, True):
        module = BatchNorm(use_running_average=True, dtype=jnp.float32, relu=True, tuned=tuned)
        variables = module.init(jax.random.key(0), x)
        y, updated = module.apply(variables, x, mutable=["batch_stats"])
        np.testing.assert_allclose(y, np.maximum(x, 0) / np.sqrt(1 + 1e-5), rtol=1e-6)
        assert_same(updated["batch_stats"], variables["batch_stats"], 0)


WHERE = ((1, 1), ((1, 1), (1, 1)))


def normalized_and_convolved(x, params, kernel, make=BatchNorm.remade):
    module = BatchNorm(use_running_average=False, dtype=x.dtype, relu=True, tuned=True)
    variables = {"params": params, "batch_stats": {"mean": jnp.zeros(x.shape[-1]), "var": jnp.ones(x.shape[-1])}}
    y, _ = module.apply(variables, x, method=make, mutable=["batch_stats"])
    remade = y if isinstance(y, convolution.Remade) else None
    return convolution.conv_general_dilated(convolution.array(y), kernel, *WHERE, remade=remade)


def plainly_normalized_and_convolved(x, params, kernel):
    y = (x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + 1e-5) * params["scale"] + params["bias"]
    return convolution.plain_convolve(jnp.maximum(y, 0), kernel, *WHERE)


def test_a_convolution_makes_it_again():
    with jax.enable_x64(True):
        x, kernel = normal(0, 4, 6, 6, 3), normal(1, 3, 3, 3, 5)
        arguments = x, {"scale": normal(2, 3), "bias": normal(3, 3)}, kernel
        found, vjp = jax.vjp(normalized_and_convolved, *arguments)
        expected, plain_vjp = jax.vjp(plainly_normalized_and_convolved, *arguments)
        direction = normal(4, *expected.shape)
        assert_same((found, vjp(direction)), (expected, plain_vjp(direction)), 1e-12)


def test_a_convolution_keeps_nothing_but_what_was_normalised():
    x, kernel = normal(0, 4, 6, 6, 3), normal(1, 3, 3, 3, 5)
    params = {"scale": normal(2, 3), "bias": normal(3, 3)}
    for make, kept in ((BatchNorm.remade, 1), (BatchNorm.__call__, 2)):
        step = functools.partial(normalized_and_convolved, make=make)
        residuals = jax.tree.leaves(jax.vjp(step, x, params, kernel)[1])
        assert len({id(a) for a in residuals if a.shape == x.shape}) == kept


def test_add_relu():
    x, y = normal(0, 2, 3, 3, 4), normal(1, 2, 3, 3, 4)
    y = y.at[0].set(-x[0])  # where the sum is 0, and the ReLU's gradient too
    found, vjp = jax.vjp(normalization.add_relu, x, y)
    expected, plain_vjp = jax.vjp(lambda x, y: jax.nn.relu(x + y), x, y)
    direction = normal(2, *x.shape)
    assert_same((found, vjp(direction)), (expected, plain_vjp(direction)), 0)
