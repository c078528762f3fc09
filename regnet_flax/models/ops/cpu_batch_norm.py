"""Batch normalisation, and the ReLU after it, in few passes over memory.

In the training step of `plain.batch_norm`, XLA:CPU writes out the differences from the mean, the masked gradient and
its products, each as large as the activations. `batch_norm` keeps X alone and computes these anew where they are used,
with both sums of the backward pass in one reduction. The equations are the same; which derivatives are defined is said
in `cpu`. See benchmarks/README.md for what was measured.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from regnet_flax.models.ops import plain
from regnet_flax.models.ops.cpu import Remade, no_inline, pixel_sums
from regnet_flax.models.ops.plain import over_devices
from regnet_flax.models.ops.varying import vary_together

Array = jax.Array


class Passes(NamedTuple):
    """The passes over X of which `batch_norm` consists.

    Attributes:
      statistics: (x, axis_name) → mean and biased variance, over the devices too.
      gradient_sums: (d, x, mean, variance, scale, bias, *, relu, epsilon) → the gradients of bias and scale, of this
        device.
      input_gradient: (the same, and those gradients' means over the devices) → the gradient of x.
    """

    statistics: Callable[..., tuple[Array, Array]]
    gradient_sums: Callable[..., tuple[Array, Array]]
    input_gradient: Callable[..., Array]


def batch_norm(
    x: Array,
    scale: Array,
    bias: Array,
    *,
    relu: bool = False,
    epsilon: float = 1e-5,
    dtype: Any = None,
    axis_name: str | None = None,
    passes: Passes | None = None,
) -> tuple[Remade, Array, Array]:
    """Normalises by the batch's own statistics, for a convolution that can make it from X again; see Ops.

    `passes` defaults to this module's.
    """
    dtype = jnp.dtype(dtype or x.dtype)
    x, scale, bias = vary_together(x, scale, bias)
    normalized: Any = _batch_norm(x, scale, bias, passes or PASSES, epsilon, relu, dtype, axis_name)
    y, mean, variance = normalized
    return Remade(y, (x, mean, variance, scale, bias), Normalizer(relu, dtype, epsilon)), mean, variance


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6, 7))
def _batch_norm(x, scale, bias, passes, epsilon, relu, dtype, axis_name):
    return _forward(x, scale, bias, passes, epsilon, relu, dtype, axis_name)[0]


def _forward(x, scale, bias, passes, epsilon, relu, dtype, axis_name):
    mean, variance = passes.statistics(x, axis_name)
    y = Normalizer(relu, dtype, epsilon)(x, mean, variance, scale, bias)
    return (y, mean, variance), (x, scale, bias, mean, variance)


@dataclasses.dataclass(frozen=True)
class Normalizer:
    """Makes Y from X and, for each of the last axis's channels, mean, variance, scale and bias."""

    relu: bool
    dtype: Any
    epsilon: float

    def __call__(self, x: Array, mean: Array, variance: Array, scale: Array, bias: Array) -> Array:
        y = (x - mean) * (lax.rsqrt(variance + self.epsilon) * scale) + bias
        return (jax.nn.relu(y) if self.relu else y).astype(self.dtype)


def _backward(passes, epsilon, relu, dtype, axis_name, saved, gradients):
    del dtype
    x, scale, bias, mean, variance = saved
    d, *by_statistics = gradients
    values, options = (_array(d, x), x, mean, variance, scale, bias), {"relu": relu, "epsilon": epsilon}
    by_bias, by_scale = local = passes.gradient_sums(*values, **options)
    dx = passes.input_gradient(*values, *(over_devices(s, axis_name) for s in local), **options)
    if not all(isinstance(gradient, SymbolicZero) for gradient in by_statistics):
        # As in the gradient of a convolution's kernel gradient, which is computed from `Remade.operands`.
        dx += through_statistics(x, axis_name, *by_statistics)
    return dx, by_scale.astype(scale.dtype), by_bias.astype(bias.dtype)


def through_statistics(x, axis_name, *gradients):
    """The gradient of X from those of its mean and its variance."""
    statistics, vjp = jax.vjp(lambda x: plain.statistics(x, axis_name), x)
    return vjp(tuple(map(_array, gradients, statistics)))[0]


def _array(gradient, like):
    return jnp.zeros_like(like) if isinstance(gradient, SymbolicZero) else gradient


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _pixels(x):
    return x.size // x.shape[-1]


def _statistics(x, axis_name):
    mean = over_devices(_mean(x), axis_name)
    return mean, over_devices(_variance(x, mean), axis_name)


@no_inline
def _mean(x):
    return pixel_sums([_wide(x)])[0] / _pixels(x)


@no_inline
def _variance(x, mean):
    return pixel_sums([jnp.square(x - mean)])[0] / _pixels(x)


def _before(d, x, mean, root, scale, bias, relu):
    """The gradient of what the ReLU is given, and X normalised."""
    d, x = _wide(d), x - mean
    return (jnp.where(x * (root * scale) + bias > 0, d, 0) if relu else d), x * root


@functools.partial(no_inline, static=("relu",))
def _gradient_sums(d, x, mean, root, scale, bias, *, relu):
    d, x = _before(d, x, mean, root, scale, bias, relu)
    return tuple(pixel_sums([d, d * x]))


@functools.partial(no_inline, static=("relu",))
def _input_gradient(d, x, mean, root, scale, bias, by_bias, by_scale, *, relu):
    count, dtype = _pixels(x), x.dtype
    d, x = _before(d, x, mean, root, scale, bias, relu)
    return ((d - (by_bias + x * by_scale) / count) * (root * scale)).astype(dtype)


def gradient_sums(d, x, mean, variance, scale, bias, *, relu, epsilon):
    """`Passes.gradient_sums`."""
    return _gradient_sums(d, x, mean, lax.rsqrt(variance + epsilon), scale, bias, relu=relu)


def input_gradient(d, x, mean, variance, scale, bias, by_bias, by_scale, *, relu, epsilon):
    """`Passes.input_gradient`."""
    root = lax.rsqrt(variance + epsilon)
    return _input_gradient(d, x, mean, root, scale, bias, by_bias, by_scale, relu=relu)


# With symbolic zeros, first derivatives compute nothing for the statistics.
_batch_norm.defvjp(
    lambda x, scale, bias, *options: _forward(x.value, scale.value, bias.value, *options),
    _backward,
    symbolic_zeros=True,
)
PASSES = Passes(_statistics, gradient_sums, input_gradient)


def add_relu(x: Array, y: Array) -> Array:
    """ReLU(x + y), of which the backward pass needs the result alone."""
    return _add_relu(*vary_together(x, y))


@jax.custom_vjp
def _add_relu(x, y):
    return jax.nn.relu(x + y)


def _add_relu_forward(x, y):
    result = jax.nn.relu(x + y)
    return result, result


def _add_relu_backward(result, d):
    d = jnp.where(result > 0, d, 0)
    return d, d


_add_relu.defvjp(_add_relu_forward, _add_relu_backward)
