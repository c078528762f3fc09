"""Batch normalisation, and the ReLU after it, in few passes over memory.

Flax's module, in whose training step XLA:CPU writes out the differences from the mean, the masked gradient and its
products, each as large as the activations. `normalize` keeps X alone and computes these anew where they are used, with
both sums of the backward pass in one reduction. The equations are Flax's; only reverse-mode differentiation is defined.
See benchmarks/README.md for what was measured.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from regnet_flax.models.convolution import Remade, alone, array, sums

Array = jax.Array


class BatchNorm(nn.BatchNorm):
    """Flax's batch normalisation over all axes but the last, with PyTorch's momentum 0.1 (Flax's 0.9) and epsilon.

    Its variance is taken in two passes, like PyTorch's: E[x²] − E[x]² would lose digits.

    Attributes:
      relu: whether a ReLU follows.
      tuned: train by `normalize`, which is fast on a CPU.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    use_fast_variance: bool = False
    relu: bool = False
    tuned: bool = False

    def __call__(self, x: Array) -> Array:
        """From (N, height, width, n) to the same, in `dtype`; statistics are float32 or wider."""
        return array(self.remade(x))

    @nn.compact
    def remade(self, x: Array) -> Array | Remade:
        """The same, for a convolution that can make it from X again."""
        if not self.tuned or self.use_running_average or self.is_initializing():
            y = super().__call__(x)
            return nn.relu(y) if self.relu else y
        scale, bias = (self.get_variable("params", name) for name in ("scale", "bias"))
        options: Any = (self.epsilon, self.relu, self.dtype or x.dtype)
        normalized: Any = normalize(x, scale, bias, *options, self.axis_name)
        y, mean, variance = normalized
        for name, value in {"mean": mean, "var": variance}.items():
            running = self.get_variable("batch_stats", name)
            value = self.momentum * running + (1 - self.momentum) * lax.stop_gradient(value)
            self.put_variable("batch_stats", name, value)
        factor = lax.rsqrt(variance + self.epsilon) * scale
        return Remade(y, (x, mean, factor, bias), _normalizer(*options[1:]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def normalize(
    x: Array, scale: Array, bias: Array, epsilon: float, relu: bool, dtype: Any, axis_name: str | None
) -> tuple[Array, Array, Array]:
    """Normalises by the batch's own statistics.

    Args:
      x: (N, height, width, n).
      scale, bias: (n,).
      epsilon: is added to the variance.
      relu: whether a ReLU follows.
      dtype: of the first result.
      axis_name: of the devices over which statistics are taken; None is this one's batch.

    Returns:
      (N, height, width, n); and the mean and the biased variance, (n,) in float32 or wider, which are not
      differentiated.
    """
    return _forward(x, scale, bias, epsilon, relu, dtype, axis_name)[0]


def _forward(x, scale, bias, epsilon, relu, dtype, axis_name):
    mean = _over_devices(_mean(x), axis_name)
    variance = _over_devices(_variance(x, mean), axis_name)
    y = _normalizer(relu, dtype)(x, mean, lax.rsqrt(variance + epsilon) * scale, bias)
    return (y, mean, variance), (x, scale, bias, mean, variance)


@functools.cache  # so that equal ones are one
def _normalizer(relu, dtype):
    def make(x, mean, factor, bias):
        y = (x - mean) * factor + bias
        return (nn.relu(y) if relu else y).astype(dtype)

    return make


def _backward(epsilon, relu, dtype, axis_name, saved, gradients):
    del dtype
    x, scale, bias, mean, variance = saved
    root = lax.rsqrt(variance + epsilon)
    by_bias, by_scale = local = _gradient_sums(gradients[0], x, mean, root, scale, bias, relu=relu)
    dx = _input_gradient(
        gradients[0], x, mean, root, scale, bias, *(_over_devices(s, axis_name) for s in local), relu=relu
    )
    return dx, by_scale.astype(scale.dtype), by_bias.astype(bias.dtype)


def _over_devices(value, axis_name):
    return value if axis_name is None else lax.pmean(value, axis_name)


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _pixels(x):
    return x.size // x.shape[-1]


@alone
def _mean(x):
    return sums([_wide(x)])[0] / _pixels(x)


@alone
def _variance(x, mean):
    return sums([jnp.square(x - mean)])[0] / _pixels(x)


def _before(d, x, mean, root, scale, bias, relu):
    """The gradient of what the ReLU is given, and X normalised."""
    d, x = _wide(d), x - mean
    return (jnp.where(x * (root * scale) + bias > 0, d, 0) if relu else d), x * root


@functools.partial(alone, static=("relu",))
def _gradient_sums(d, x, mean, root, scale, bias, *, relu):
    d, x = _before(d, x, mean, root, scale, bias, relu)
    return tuple(sums([d, d * x]))


@functools.partial(alone, static=("relu",))
def _input_gradient(d, x, mean, root, scale, bias, by_bias, by_scale, *, relu):
    count, dtype = _pixels(x), x.dtype
    d, x = _before(d, x, mean, root, scale, bias, relu)
    return ((d - (by_bias + x * by_scale) / count) * (root * scale)).astype(dtype)


normalize.defvjp(_forward, _backward)


@jax.custom_vjp
def add_relu(x: Array, y: Array) -> Array:
    """ReLU(x + y), of which the backward pass needs the result alone."""
    return nn.relu(x + y)


def _add_relu_backward(result, d):
    d = jnp.where(result > 0, d, 0)
    return d, d


def _add_relu_forward(x, y):
    result = add_relu(x, y)
    return result, result


add_relu.defvjp(_add_relu_forward, _add_relu_backward)
