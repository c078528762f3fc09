"""The separable ConvLSTM's step as Pallas kernels, for a GPU.

A gate's sums take few multiply-adds and much memory: written out, the shifted products of four gates are many times the
size of the state. Here a program of the kernel holds some pixels of one image with all their channels, reads each
neighbour of X and H once for all gates, and writes the new state alone; the backward pass recomputes the gates from
X, H and C. The equations in `cells` are the reference. Only first derivatives in reverse mode are defined.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from regnet_flax.models.ops import cells, plain
from regnet_flax.models.ops.varying import divided, vary_together

Array = jax.Array

GATES = 4
ELEMENTS = 1024  # of X in one program
_TAPS = [(k, k // 3 - 1, k % 3 - 1) for k in range(9)]


def lstm_step(x: Array, state: cells.State, weights: tuple[Array, ...]) -> tuple[cells.State, cells.Gates]:
    """One step of a separable ConvLSTM, of equal dtypes and computed in float32; see Ops.

    It is plain.lstm_step for float64, for no images, and for arrays that a mesh with explicit axes divides. The gates
    by the plain equations are computed only where they are asked for.
    """
    found, gates = plain.lstm_step(x, state, weights)
    arrays = x, *state, *weights
    if not x.size or jnp.result_type(*arrays) == jnp.float64 or any(map(divided, arrays)):
        return found, gates
    return _step(*vary_together(x, *state, *weights)), gates


@jax.custom_vjp
def _step(x, h, c, pointwise, kernel, bias):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return _call(_forward_kernel, (shape, shape), (), (x, h, c), (pointwise, kernel, bias))


@jax.custom_jvp
def _gradients(x, h, c, pointwise, kernel, bias, *d):
    batch, height, width, n = x.shape
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    of_gates = jax.ShapeDtypeStruct((batch, height, width, GATES, n), jnp.float32)
    ds, dc, by_tap, by_bias = _call(
        _gates_backward_kernel,
        (of_gates, like),
        ((9, GATES, n), (GATES, n)),
        (x, h, c, *d),
        (pointwise, kernel, bias),
    )
    dx, dh, by_input = _call(_inputs_backward_kernel, (like, like), ((2, GATES, n),), (x, h, ds), (pointwise, kernel))
    weights = (by_input, by_tap.reshape(kernel.shape), by_bias)
    dtypes = (pointwise.dtype, kernel.dtype, bias.dtype)
    return dx, dh, dc, *(a.astype(dtype) for a, dtype in zip(weights, dtypes, strict=True))


@_gradients.defjvp
def _second_derivatives(primals, tangents):
    raise TypeError('the ConvLSTM of ops="gpu" has no second derivatives: give create_model ops="plain"')


_step.defvjp(lambda *args: (_step(*args), args), lambda saved, d: _gradients(*saved, *d))


def _pixels(n: int, size: int) -> int:
    """Pixels of a program: a power of two, as Triton has it."""
    return max(1, min(ELEMENTS // pl.next_power_of_2(n), pl.next_power_of_2(size)))


def _call(
    kernel: Any,
    outputs: tuple[Any, ...],
    sums: tuple[tuple[int, ...], ...],
    images: tuple[Array, ...],
    weights: tuple[Array, ...],
) -> tuple[Array, ...]:
    """Runs a kernel over all pixels; images come to it as (N, height · width, …), weights as (…, gates, n).

    Where the program runs on anything but a GPU, which JAX knows when it compiles, the kernel is interpreted.

    Args:
      kernel: of a place, `images`, `weights` and what it writes.
      outputs: shapes and dtypes of the images that it writes.
      sums: shapes of what it sums over pixels, each program its own.
    """
    batch, height, width, n = images[0].shape
    blocks = pl.cdiv(height * width, _pixels(n, height * width))

    varying = {"manual_axis_type": jax.typeof(images[0]).manual_axis_type}

    def flat(a):
        return (batch, height * width, *a.shape[3:])

    def call(*arrays, interpret):
        return pl.pallas_call(
            functools.partial(kernel, _Place(height, width, n)),
            out_shape=[
                *(jax.ShapeDtypeStruct(flat(a), a.dtype, **varying) for a in outputs),
                *(jax.ShapeDtypeStruct((batch * blocks, *shape), jnp.float32, **varying) for shape in sums),
            ],
            grid=(batch, blocks),
            interpret=interpret,
            compiler_params=None if interpret else plgpu.CompilerParams(num_warps=4),
        )(*arrays)

    compiled = functools.partial(call, interpret=False)
    found = lax.platform_dependent(
        *(a.reshape(flat(a)) for a in images),
        *(a.reshape(-1, GATES, n) for a in weights),
        cuda=compiled,
        rocm=compiled,
        default=functools.partial(call, interpret=True),
    )
    drawn = (a.reshape(b.shape) for a, b in zip(found[: len(outputs)], outputs, strict=True))
    return *drawn, *(a.sum(0) for a in found[len(outputs) :])


class _Place:
    """Which pixels and channels a program has, and how it reads and writes them."""

    def __init__(self, height: int, width: int, n: int):
        self.height, self.width, self.n = height, width, n
        self.count = _pixels(n, height * width)

    def enter(self) -> _Place:
        """Inside the kernel: this program's own."""
        self.image, self.block = pl.program_id(0), pl.program_id(1)
        self.pixel = self.block * self.count + jnp.arange(self.count)
        self.channel = jnp.arange(pl.next_power_of_2(self.n))
        self.here = self.channel < self.n
        self.mask = (self.pixel < self.height * self.width)[:, None] & self.here[None, :]
        return self

    @property
    def program(self) -> Array:
        """Its number."""
        return self.image * pl.num_programs(1) + self.block

    def _at(self, down: int, right: int):
        row, column = self.pixel // self.width + down, self.pixel % self.width + right
        inside = (row >= 0) & (row < self.height) & (column >= 0) & (column < self.width)
        return self.pixel + down * self.width + right, inside[:, None] & self.mask

    def read(self, ref: Any, *rest: int, down: int = 0, right: int = 0) -> Array:
        """(pixels, channels) of an image, shifted, in float32; 0 outside."""
        pixel, mask = self._at(down, right)
        index = (self.image, pixel[:, None], *rest, self.channel[None, :])
        return plgpu.load(ref.at[index], mask=mask, other=0.0).astype(jnp.float32)

    def write(self, ref: Any, value: Array, *rest: int) -> None:
        """A (pixels, channels) array into an image."""
        index = (self.image, self.pixel[:, None], *rest, self.channel[None, :])
        plgpu.store(ref.at[index], value.astype(ref.dtype), mask=self.mask)

    def weight(self, ref: Any, *rest: int) -> Array:
        """(1, channels) of a weight, in float32."""
        index = (*rest, self.channel)
        return plgpu.load(ref.at[index], mask=self.here, other=0.0).astype(jnp.float32)[None, :]

    def write_sum(self, ref: Any, value: Array, *rest: int) -> None:
        """The sum over this program's pixels of a (pixels, channels) array, to be summed over the programs."""
        index = (self.program, *rest, self.channel)
        plgpu.store(ref.at[index], jnp.where(self.mask, value, 0).sum(0), mask=self.here)


def _sums(place, x_ref, h_ref, pointwise_ref, kernel_ref, bias_ref):
    """The sums of the four gates."""
    sums = [jnp.zeros((place.count, place.channel.size), jnp.float32)] * GATES
    for k, down, right in _TAPS:
        x, h = (place.read(ref, down=down, right=right) for ref in (x_ref, h_ref))
        for gate in range(GATES):
            pair = x * place.weight(pointwise_ref, 0, gate) + h * place.weight(pointwise_ref, 1, gate)
            sums[gate] += pair * place.weight(kernel_ref, k, gate)
    return [a + place.weight(bias_ref, 0, gate) for gate, a in enumerate(sums)]


def _gates(sums):
    return [*map(jax.nn.sigmoid, sums[:3]), jnp.tanh(sums[3])]


def _forward_kernel(place, x_ref, h_ref, c_ref, pointwise_ref, kernel_ref, bias_ref, new_h_ref, new_c_ref):
    place.enter()
    i, f, o, g = _gates(_sums(place, x_ref, h_ref, pointwise_ref, kernel_ref, bias_ref))
    c = f * place.read(c_ref) + i * g
    place.write(new_c_ref, c)
    place.write(new_h_ref, o * jnp.tanh(c))


def _gates_backward_kernel(
    place,
    x_ref, h_ref, c_ref, d_new_h_ref, d_new_c_ref, pointwise_ref, kernel_ref, bias_ref,
    d_sums_ref, d_c_ref, by_tap_ref, by_bias_ref,
):  # fmt: skip
    """Gradients of the sums and of C, and what is summed of the taps' and the bias's."""
    place.enter()
    i, f, o, g = _gates(_sums(place, x_ref, h_ref, pointwise_ref, kernel_ref, bias_ref))
    c = place.read(c_ref)
    t = jnp.tanh(f * c + i * g)
    d_h = place.read(d_new_h_ref)
    d_c = place.read(d_new_c_ref) + d_h * o * (1 - t * t)
    d_sums = [d_c * g * i * (1 - i), d_c * c * f * (1 - f), d_h * t * o * (1 - o), d_c * i * (1 - g * g)]
    place.write(d_c_ref, d_c * f)
    for gate, d in enumerate(d_sums):
        place.write(d_sums_ref, d, gate)
        place.write_sum(by_bias_ref, d, gate)
    for k, down, right in _TAPS:
        x, h = (place.read(ref, down=down, right=right) for ref in (x_ref, h_ref))
        for gate, d in enumerate(d_sums):
            pair = x * place.weight(pointwise_ref, 0, gate) + h * place.weight(pointwise_ref, 1, gate)
            place.write_sum(by_tap_ref, pair * d, k, gate)


def _inputs_backward_kernel(place, x_ref, h_ref, d_sums_ref, pointwise_ref, kernel_ref, d_x_ref, d_h_ref, by_input_ref):
    """Gradients of X and H, and what is summed of the pointwise weights'."""
    place.enter()
    inputs = [place.read(x_ref), place.read(h_ref)]
    d_inputs = [jnp.zeros((place.count, place.channel.size), jnp.float32)] * 2
    for gate in range(GATES):
        d_pair = jnp.zeros((place.count, place.channel.size), jnp.float32)
        for k, down, right in _TAPS:
            d_pair += place.read(d_sums_ref, gate, down=-down, right=-right) * place.weight(kernel_ref, k, gate)
        for number, array in enumerate(inputs):
            d_inputs[number] += d_pair * place.weight(pointwise_ref, number, gate)
            place.write_sum(by_input_ref, array * d_pair, number, gate)
    place.write(d_x_ref, d_inputs[0])
    place.write(d_h_ref, d_inputs[1])
