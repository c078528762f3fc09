"""Convolutions in the forms that are fast on a CPU.

XLA:CPU brings convolutions into the form that its library takes in the entry computation only, and has loops of its
own, tens of times slower, for what is left: inside a loop, as that of `nn.scan`, that is all gradients. So they are
written in that form here. In the filter's, channels and images change places; the transpositions stand in a
computation of their own, or XLA would fuse into each all that made the array, and compute it anew in the worst order.
The gradient of a regulator's depthwise taps is nine reductions, for each of which XLA writes out a shifted copy of an
array four times the size of the input; here it is one reduction. The results are those of the plain forms, to rounding;
only reverse-mode differentiation is defined. See benchmarks/README.md for what was measured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

Array = jax.Array
Padding = tuple[tuple[int, int], ...]


def alone(function: Callable[..., Any], static: Sequence[str] = ()) -> Callable[..., Any]:
    """`function` as a computation that XLA does not merge with what is around it.

    Its operands are written out once, in their own order; XLA:CPU would fuse what makes them into each of its uses, and
    it removes `optimization_barrier` before it fuses.

    Args:
      function: of arrays.
      static: names of arguments that are no arrays, to be given by name.
    """
    compiled = jax.jit(function, static_argnames=static)

    @functools.wraps(function)
    def call(*operands: Any, **options: Any) -> Any:
        return set_xla_metadata(compiled(*operands, **options), inlineable="false")

    return call


@flax.struct.dataclass
class Remade:
    """An array, and what a convolution's backward pass makes it from again, instead of keeping it.

    Attributes:
      array: make(*operands).
      operands: arrays that are kept anyway. No gradient goes to them; the array's is the caller's to pass on.
      make: a function of module level, or the like: one that is equal from call to call.
    """

    array: Array
    operands: tuple[Array, ...]
    make: Callable[..., Array] = flax.struct.field(pytree_node=False)


def array(x: Array | Remade) -> Array:
    return x.array if isinstance(x, Remade) else x


def conv_general_dilated(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    remade: Remade | None = None,
    **options: Any,
) -> Array:
    """`jax.lax.conv_general_dilated`, its gradients in forms that are fast on a CPU, for `nn.Conv`.

    Args:
      lhs: (N, height, width, inputs).
      rhs: (height, width, inputs, outputs).
      window_strides, padding: of height and width.
      remade: of what lhs is made; None keeps lhs itself for the backward pass.
      **options: as nn.Conv gives them: no dilation, no groups, NHWC.

    Returns:
      (N, height, width, outputs).
    """
    del options
    operands, make = (remade.operands, remade.make) if remade else ((lhs,), _unchanged)
    return _convolve(lhs, rhs, operands, make, tuple(window_strides), tuple(map(tuple, padding)))


def _unchanged(x):
    return x


def plain_convolve(x: Array, kernel: Array, strides: Sequence[int], padding: Sequence[tuple[int, int]]) -> Array:
    """NHWC and HWIO to NHWC."""
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _convolve(
    x: Array, kernel: Array, kept: tuple[Array, ...], make: Any, strides: tuple[int, int], padding: Padding
) -> Array:
    return plain_convolve(x, kernel, strides, padding)


def _forward(x, kernel, kept, make, strides, padding):
    return plain_convolve(x, kernel, strides, padding), (kernel, kept)


def _backward(make, strides, padding, saved, d):
    kernel, kept = saved
    shape = jax.eval_shape(make, *kept).shape
    by_kernel = _filter_gradient(d, *kept, make=make, shape=kernel.shape, strides=strides, padding=padding)
    return _input_gradient(d, kernel, shape, strides, padding), by_kernel.astype(kernel.dtype), None


def _input_gradient(d, kernel, shape, strides, padding):
    if strides != (1, 1):
        x = jax.ShapeDtypeStruct(shape, d.dtype)
        return jax.linear_transpose(lambda x: plain_convolve(x, kernel, strides, padding), x)(d)[0]
    sizes = kernel.shape[:2]
    padding = [(size - 1 - low, size - 1 - high) for size, (low, high) in zip(sizes, padding, strict=True)]
    return plain_convolve(d, kernel[::-1, ::-1].swapaxes(2, 3), strides, padding)


@functools.partial(alone, static=("make", "shape", "strides", "padding"))
def _filter_gradient(d, *kept, make, shape, strides, padding):
    wide = jnp.promote_types(d.dtype, jnp.float32)
    x = kept[0] if make is _unchanged else alone(make)(*kept)
    if shape[:2] == (1, 1) and not any(map(any, padding)):
        x = x[:, :: strides[0], :: strides[1]]
        x, d = (a.reshape(-1, a.shape[-1]) for a in (x, d))
        return jnp.matmul(x.T, d, preferred_element_type=wide).reshape(shape)
    # A convolution in which channels take the place of images, and images that of channels.
    lengths = zip(shape[:2], x.shape[1:3], d.shape[1:3], strides, padding, strict=True)
    padding = [(low, size + (steps - 1) * stride - length - low) for size, length, steps, stride, (low, _) in lengths]
    return _correlate(x.transpose(3, 1, 2, 0).astype(wide), d, strides=strides, padding=tuple(padding))


@functools.partial(alone, static=("strides", "padding"))
def _correlate(x, d, *, strides, padding):
    return lax.conv_general_dilated(
        x,
        d.transpose(1, 2, 0, 3).astype(x.dtype),
        window_strides=(1, 1),
        padding=padding,
        rhs_dilation=strides,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    ).transpose(1, 2, 0, 3)


_convolve.defvjp(_forward, _backward)


def plain_depthwise(x: Array, kernel: Array) -> Array:
    """A depthwise 3×3 convolution as a sum of shifted products.

    It is bound by memory, and XLA fuses these, while its grouped convolutions are slow on a CPU.

    Args:
      x: (N, height, width, …).
      kernel: (3, 3, …), the same axes.

    Returns:
      Of x's shape, summed in float32 or wider.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    taps = [tap.astype(wide) * kernel[k // 3, k % 3].astype(wide) for k, tap in enumerate(_shifted(x))]
    return sum(taps[1:], taps[0])


def _shifted(x: Array) -> list[Array]:
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), *[(0, 0)] * (x.ndim - 3)))
    return [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]


def pairs(x: Array, h: Array, pointwise: Array) -> Array:
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


def plain_separable(x: Array, h: Array, pointwise: Array, kernel: Array) -> Array:
    """The regulators' efficient convolution: `pairs`, then a depthwise one.

    Args:
      x, h: (N, height, width, n).
      pointwise: (2, gates, n).
      kernel: (3, 3, gates, n).

    Returns:
      (N, height, width, gates, n), in float32 or wider.
    """
    return plain_depthwise(pairs(x, h, pointwise), kernel)


@jax.custom_vjp
def separable(x: Array, h: Array, pointwise: Array, kernel: Array) -> Array:
    """`plain_separable`, the pairs recomputed in the backward pass, and each filter gradient as one reduction."""
    return plain_separable(x, h, pointwise, kernel)


_depthwise_alone = alone(plain_depthwise)


@alone
def _separable_backward(x, h, pointwise, kernel, d):
    wide = d.dtype
    by_tap = sums([tap.astype(wide) * d for tap in _shifted(pairs(x, h, pointwise))])
    d = _depthwise_alone(d, kernel[::-1, ::-1]).astype(x.dtype).astype(wide)
    by_input = sums([x[..., None, :].astype(wide) * d, h[..., None, :].astype(wide) * d])
    dx, dh = ((d * weights.astype(wide)).sum(3) for weights in pointwise)
    return (
        dx.astype(x.dtype),
        dh.astype(h.dtype),
        by_input.astype(pointwise.dtype),
        by_tap.reshape(kernel.shape).astype(kernel.dtype),
    )


def sums(arrays: list[Array]) -> Array:
    """Of each array (N, height, width, …) over batch, height and width, stacked: (arrays, …)."""
    # Along a row in one loop for all of them, which XLA does not do for a reduction each; the rest is little.
    zeros = (jnp.zeros((), arrays[0].dtype),) * len(arrays)
    rows = lax.reduce(tuple(arrays), zeros, lambda a, b: tuple(p + q for p, q in zip(a, b, strict=True)), (2,))
    return jnp.stack([row.sum((0, 1)) for row in rows])


separable.defvjp(lambda *args: (plain_separable(*args), args), lambda saved, d: _separable_backward(*saved, d))
