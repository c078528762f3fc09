"""Convolutions in the forms that are fast on a CPU.

XLA:CPU brings convolutions into the form that its library takes in the entry computation only, and has loops of its
own, tens of times slower, for what is left: inside a loop, as that of `nn.scan`, that is all gradients. So they are
written in that form here. In the filter's, channels and images change places; the transpositions stand in a
computation of their own, or XLA would fuse into each all that made the array, and compute it anew in the worst order.
The gradient of a regulator's depthwise taps is nine reductions, for each of which XLA writes out a shifted copy of an
array four times the size of the input; here it is one reduction. The results are those of `plain`, up to rounding.

The functions have reverse rules of their own (`jax.custom_vjp`), so JAX refuses their forward mode. The rules are plain
functions: gradients of gradients, and forward over reverse as in a Hessian-vector product, are defined.
See benchmarks/README.md for what was measured.
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

from regnet_flax.models.ops import cells, plain
from regnet_flax.models.ops.varying import divided, vary_together

Array = jax.Array
Padding = tuple[tuple[int, int], ...]


def no_inline(function: Callable[..., Any], static: Sequence[str] = ()) -> Callable[..., Any]:
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
      operands: arrays that are kept anyway. First derivatives go to the array alone; those of a kernel's gradient go to
        the operands, from which it is computed.
      make: a function of module level, or the like: one that is equal from call to call.
    """

    array: Array
    operands: tuple[Array, ...]
    make: Callable[..., Array] = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> Any:
        return self.array.dtype


def array(x: Array | Remade) -> Array:
    """What `batch_norm` and `concatenate` give, as an array."""
    return x.array if isinstance(x, Remade) else x


def concatenate(x: Array | Remade, y: Array | Remade) -> Remade:
    """Along the channels; a convolution's backward pass concatenates again."""
    operands = array(x), array(y)
    return Remade(plain.concatenate(*operands), operands, plain.concatenate)


def conv(
    x: Array | Remade, kernel: Array, strides: Sequence[int], padding: str | Sequence[tuple[int, int]], **options: Any
) -> Array:
    """`plain.conv`, its gradients in forms that are fast on a CPU; for `nn.Conv`'s conv_general_dilated too.

    Where `options` ask for dilation, groups, a precision, a type of the sums or another layout, it is `plain.conv`, and
    where a mesh's explicit axes divide the images: in the filter's gradient they would divide the channels.

    Args:
      x: (N, height, width, inputs), or what `batch_norm` or `concatenate` gave.
      kernel: (height, width, inputs, outputs).
      strides: of height and width.
      padding: of height and width, or "SAME", "SAME_LOWER" or "VALID".
      **options: of `jax.lax.conv_general_dilated`.

    Returns:
      (N, height, width, outputs).
    """
    if asks_for_more(x, kernel, **options) or divided(array(x)):
        return plain.conv(array(x), kernel, strides, padding, **options)
    where = tuple(strides), explicit(padding, x.shape, kernel.shape, strides)
    operands, make = (x.operands, x.make) if isinstance(x, Remade) else ((x,), _unchanged)
    return _conv(*vary_together(array(x), kernel), operands, make, *where)


def explicit(
    padding: str | Sequence[tuple[int, int]], shape: Sequence[int], kernel: Sequence[int], strides: Sequence[int]
) -> Padding:
    """A convolution's padding in numbers, for images and a kernel of these shapes."""
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(shape[1:3], kernel[:2], strides, padding)
    return tuple((low, high) for low, high in padding)


def asks_for_more(
    x: Any,
    kernel: Array,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = plain.NHWC,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    **others: Any,
) -> bool:
    """Whether a convolution is other than `_conv` computes it."""
    if len(x.shape) != 4 or any(value is not None for value in others.values()):
        return True
    dilated = any(size != 1 for size in (*(lhs_dilation or ()), *(rhs_dilation or ())))
    layouts = (lax.conv_dimension_numbers(x.shape, kernel.shape, n) for n in (dimension_numbers, plain.NHWC))
    return dilated or feature_group_count != 1 or batch_group_count != 1 or len(set(layouts)) > 1


def _unchanged(x):
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _conv(
    x: Array, kernel: Array, kept: tuple[Array, ...], make: Any, strides: tuple[int, int], padding: Padding
) -> Array:
    return plain.conv(x, kernel, strides, padding)


def _forward(x, kernel, kept, make, strides, padding):
    return plain.conv(x, kernel, strides, padding), (kernel, kept)


def _backward(make, strides, padding, saved, d):
    kernel, kept = saved
    shape = jax.eval_shape(make, *kept).shape
    by_kernel = _filter_gradient(d, *kept, make=make, shape=kernel.shape, strides=strides, padding=padding)
    return _input_gradient(d, kernel, shape, strides, padding), by_kernel.astype(kernel.dtype), None


def _input_gradient(d, kernel, shape, strides, padding):
    before = [size - 1 - low for size, (low, _) in zip(kernel.shape[:2], padding, strict=True)]
    lengths = zip(shape[1:3], kernel.shape[:2], d.shape[1:3], strides, before, strict=True)
    around = [(low, to + size - 2 - (steps - 1) * stride - low) for to, size, steps, stride, low in lengths]
    if strides == (1, 1):
        return plain.conv(d, kernel[::-1, ::-1].swapaxes(2, 3), strides, around)
    numbers = ("NHWC", "HWOI", "NHWC")
    return plain.conv(d, kernel[::-1, ::-1], (1, 1), around, lhs_dilation=strides, dimension_numbers=numbers)


@functools.partial(no_inline, static=("make", "shape", "strides", "padding"))
def _filter_gradient(d, *kept, make, shape, strides, padding):
    wide = jnp.promote_types(d.dtype, jnp.float32)
    x = kept[0] if make is _unchanged else no_inline(make)(*kept)
    if shape[:2] == (1, 1) and not any(map(any, padding)):
        x = x[:, :: strides[0], :: strides[1]]
        x, d = (a.reshape(-1, a.shape[-1]) for a in (x, d))
        return jnp.matmul(x.T, d, preferred_element_type=wide).reshape(shape)
    # A convolution in which channels take the place of images, and images that of channels.
    lengths = zip(shape[:2], x.shape[1:3], d.shape[1:3], strides, padding, strict=True)
    padding = [(low, size + (steps - 1) * stride - length - low) for size, length, steps, stride, (low, _) in lengths]
    return _correlate(x.transpose(3, 1, 2, 0).astype(wide), d, strides=strides, padding=tuple(padding))


@functools.partial(no_inline, static=("strides", "padding"))
def _correlate(x, d, *, strides, padding):
    return lax.conv_general_dilated(
        x,
        d.transpose(1, 2, 0, 3).astype(x.dtype),
        window_strides=(1, 1),
        padding=padding,
        rhs_dilation=strides,
        dimension_numbers=plain.NHWC,
    ).transpose(1, 2, 0, 3)


_conv.defvjp(_forward, _backward)


def separable(x: Array, h: Array, pointwise: Array, depthwise: Array) -> Array:
    """`plain.separable`; its backward pass recomputes the pairs, and takes each filter gradient as one reduction."""
    return _separable(*vary_together(x, h, pointwise, depthwise))


@jax.custom_vjp
def _separable(x, h, pointwise, depthwise):
    return plain.separable(x, h, pointwise, depthwise)


_depthwise_no_inline = no_inline(plain.depthwise_conv)


@no_inline
def _separable_backward(x, h, pointwise, depthwise, d):
    wide = d.dtype
    by_tap = pixel_sums([tap.astype(wide) * d for tap in plain.shifted(plain.grouped_pointwise(x, h, pointwise))])
    d = _depthwise_no_inline(d, depthwise[::-1, ::-1]).astype(x.dtype).astype(wide)
    by_input = pixel_sums([x[..., None, :].astype(wide) * d, h[..., None, :].astype(wide) * d])
    dx, dh = ((d * weights.astype(wide)).sum(3) for weights in pointwise)
    return (
        dx.astype(x.dtype),
        dh.astype(h.dtype),
        by_input.astype(pointwise.dtype),
        by_tap.reshape(depthwise.shape).astype(depthwise.dtype),
    )


@jax.custom_jvp  # JAX's rule for a reduction of several arrays fails where only some have a tangent
def pixel_sums(arrays: list[Array]) -> Array:
    """Of each array (N, height, width, …) over batch, height and width, stacked: (arrays, …)."""
    # Along a row in one loop for all of them, which XLA does not do for a reduction each; the rest is little.
    zeros = (jnp.zeros((), arrays[0].dtype),) * len(arrays)
    rows = lax.reduce(tuple(arrays), zeros, lambda a, b: tuple(p + q for p, q in zip(a, b, strict=True)), (2,))
    return jnp.stack([row.sum((0, 1)) for row in rows])


@pixel_sums.defjvp
def _pixel_sums_forward(arrays, directions):
    return pixel_sums(*arrays), jnp.stack([direction.sum((0, 1, 2)) for direction in directions[0]])


_separable.defvjp(lambda *args: (plain.separable(*args), args), lambda saved, d: _separable_backward(*saved, d))


def rnn_step(x: Array, state: cells.State, weights: tuple[Array, ...]) -> tuple[cells.State, cells.Gates]:
    """One step of a separable ConvRNN."""
    return cells.separable_step(cells.rnn, separable, x, state, weights)


def gru_step(x: Array, state: cells.State, weights: tuple[Array, ...]) -> tuple[cells.State, cells.Gates]:
    """One step of a separable ConvGRU."""
    return cells.separable_step(cells.gru, separable, x, state, weights)


def lstm_step(x: Array, state: cells.State, weights: tuple[Array, ...]) -> tuple[cells.State, cells.Gates]:
    """One step of a separable ConvLSTM."""
    return cells.separable_step(cells.lstm, separable, x, state, weights)
