"""The reference: the arithmetic as lax and jnp would have it. Every derivative of every order is JAX's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from regnet_flax.models.ops import cells

Array = jax.Array
NHWC = ("NHWC", "HWIO", "NHWC")


def conv(
    x: Array,
    kernel: Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    dimension_numbers: Any = NHWC,
    **options: Any,
) -> Array:
    """`jax.lax.conv_general_dilated`, with its options; NHWC and HWIO to NHWC."""
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=dimension_numbers, **options)


def batch_norm(
    x: Array,
    scale: Array,
    bias: Array,
    *,
    relu: bool = False,
    epsilon: float = 1e-5,
    dtype: Any = None,
    axis_name: str | None = None,
) -> tuple[Array, Array, Array]:
    """Normalises by the batch's own statistics; see Ops."""
    mean, variance = statistics(x, axis_name)
    return normalize(x, mean, variance, scale, bias, relu=relu, epsilon=epsilon, dtype=dtype), mean, variance


def statistics(x: Array, axis_name: str | None) -> tuple[Array, Array]:
    """Mean and biased variance over all axes but the last, and over the devices of `axis_name`.

    The variance takes two passes, like PyTorch's: E[x²] − E[x]² would lose digits.
    """
    axes = tuple(range(x.ndim - 1))
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = over_devices(x.mean(axes), axis_name)
    return mean, over_devices(jnp.square(x - jnp.expand_dims(mean, axes)).mean(axes), axis_name)


def over_devices(value: Array, axis_name: str | None) -> Array:
    """The mean over the devices of `axis_name`; None is this one alone."""
    return value if axis_name is None else lax.pmean(value, axis_name)


def normalize(
    x: Array,
    mean: Array,
    variance: Array,
    scale: Array,
    bias: Array,
    *,
    relu: bool = False,
    epsilon: float = 1e-5,
    dtype: Any = None,
) -> Array:
    """Normalises by given statistics: (N, height, width, n) and four of (n,) to (N, height, width, n)."""
    axes = tuple(range(x.ndim - 1))
    mean, variance, scale, bias = (jnp.expand_dims(a, axes) for a in (mean, variance, scale, bias))
    y = (x - mean) * (lax.rsqrt(variance + epsilon) * scale) + bias
    y = y.astype(dtype or x.dtype)
    return jax.nn.relu(y) if relu else y


def add_relu(x: Array, y: Array) -> Array:
    """ReLU(x + y)."""
    return jax.nn.relu(x + y)


def concatenate(x: Array, y: Array) -> Array:
    """Along the channels."""
    return jnp.concatenate([x, y], -1)


def array(x: Array) -> Array:
    """What `batch_norm` and `concatenate` give, as an array; here it is one."""
    return x


def separable(x: Array, h: Array, pointwise: Array, depthwise: Array) -> Array:
    """The regulators' efficient convolution: `grouped_pointwise`, then `depthwise_conv`; see Ops."""
    return depthwise_conv(grouped_pointwise(x, h, pointwise), depthwise)


def grouped_pointwise(x: Array, h: Array, pointwise: Array) -> Array:
    """Grouped 1×1 convolution of the pairs (x[c], h[c]) for all gates at once.

    Args:
      x, h: (N, height, width, n).
      pointwise: (2, gates, n), the weights of x and of h.

    Returns:
      (N, height, width, gates, n), of x's dtype.
    """
    # The pointwise kernel's gradient is a sum over all pixels of what it is multiplied by: that is to be wide too.
    wide = jnp.promote_types(x.dtype, jnp.float32)
    kernels = pointwise.astype(wide)
    return (x[..., None, :].astype(wide) * kernels[0] + h[..., None, :].astype(wide) * kernels[1]).astype(x.dtype)


def depthwise_conv(x: Array, kernel: Array) -> Array:
    """A depthwise 3×3 convolution as a sum of shifted products.

    Memory bounds it, and XLA fuses these, while its grouped convolutions are slow on a CPU.

    Args:
      x: (N, height, width, …).
      kernel: (3, 3, …), the same axes.

    Returns:
      Of x's shape, summed in float32 or wider.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    taps = [tap.astype(wide) * kernel[k // 3, k % 3].astype(wide) for k, tap in enumerate(shifted(x))]
    return sum(taps[1:], taps[0])


def shifted(x: Array) -> list[Array]:
    """x as each of the nine taps of a 3×3 convolution sees it, zeros around the image."""
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), *[(0, 0)] * (x.ndim - 3)))
    return [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]


def rnn_step(x: Array, state: cells.State, weights: tuple[Array, ...]) -> tuple[cells.State, cells.Gates]:
    """One step of a separable ConvRNN."""
    return cells.separable_step(cells.rnn, separable, x, state, weights)


def gru_step(x: Array, state: cells.State, weights: tuple[Array, ...]) -> tuple[cells.State, cells.Gates]:
    """One step of a separable ConvGRU."""
    return cells.separable_step(cells.gru, separable, x, state, weights)


def lstm_step(x: Array, state: cells.State, weights: tuple[Array, ...]) -> tuple[cells.State, cells.Gates]:
    """One step of a separable ConvLSTM."""
    return cells.separable_step(cells.lstm, separable, x, state, weights)
