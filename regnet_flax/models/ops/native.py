"""The separable cells' steps as native operations, one forward and one backward; cpp/ has them.

They take float32 and bfloat16. Other dtypes, and a machine without the library, have the steps of `cpu`. The gates are
computed by the plain equations, and only where they are asked for. The results are those of `plain`, up to rounding:
sums are float32, and in bfloat16 neither weights nor r⊙H are rounded.

As in `cpu`, forward mode is refused, and derivatives of the backward pass are JAX's own, of the plain equations. Under
vmap one call computes all, each with its own weights.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from regnet_flax.models.ops import cells, cpu, native_library, plain
from regnet_flax.models.ops.native_library import DTYPES, call, derivable
from regnet_flax.models.ops.varying import vary_together

Array = jax.Array
Arrays = tuple[Array, ...]

_PLAIN = {"rnn": plain.rnn_step, "gru": plain.gru_step, "lstm": plain.lstm_step}


def rnn_step(x: Array, state: cells.State, weights: Arrays) -> tuple[cells.State, cells.Gates]:
    """One step of a separable ConvRNN."""
    return _native("rnn", x, state, weights) or cpu.rnn_step(x, state, weights)


def gru_step(x: Array, state: cells.State, weights: Arrays) -> tuple[cells.State, cells.Gates]:
    """One step of a separable ConvGRU."""
    return _native("gru", x, state, weights) or cpu.gru_step(x, state, weights)


def lstm_step(x: Array, state: cells.State, weights: Arrays) -> tuple[cells.State, cells.Gates]:
    """One step of a separable ConvLSTM."""
    return _native("lstm", x, state, weights) or cpu.lstm_step(x, state, weights)


def _native(cell: str, x: Array, state: cells.State, weights: Arrays) -> Any:
    """The new state and the gates; None where they are not computed here."""
    if any(a.dtype != x.dtype for a in state) or x.dtype not in DTYPES or not native_library.available():
        return None
    x, *rest = vary_together(x, *state, *weights)
    state, weights = tuple(rest[:-3]), tuple(rest[-3:])
    pointwise, depthwise, bias = (w.astype(jnp.float32) for w in weights)
    taps = pointwise[:, None, None] * depthwise  # a and b of cpp/cells.h
    return _step(cell, x, *state, taps, bias), _gates(cell, x, state, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _step(cell: str, *arrays: Array) -> Arrays:
    """The new state, from X, the state, taps (2, 3, 3, gates, n) and bias (gates, n)."""
    x, *state, _, _ = arrays
    return tuple(call(f"regnet_flax_{cell}_forward", [jax.typeof(x)] * len(state), arrays))


def _plain_gradients(cell, arrays, directions):
    return jax.vjp(functools.partial(_plain_step, cell), *arrays)[1](directions)


@derivable(_plain_gradients)
def _gradients(cell: str, arrays: Arrays, directions: Arrays) -> Arrays:
    return tuple(call(f"regnet_flax_{cell}_backward", [jax.typeof(a) for a in arrays], arrays, directions))


def _plain_step(cell, x, *rest):
    """`_step` by the plain equations."""
    *state, taps, bias = rest

    def convolve(h, first, last):
        of_gates = (t[..., first:last, :] for t in taps)
        x_sums, h_sums = (plain.depthwise_conv(a[..., None, :], t) for a, t in zip((x, h), of_gates, strict=True))
        sums = x_sums + h_sums + bias[first:last]
        return [sums[..., gate, :] for gate in range(last - first)]

    new_state, _ = getattr(cells, cell)(convolve, tuple(state))
    return tuple(a.astype(x.dtype) for a in new_state)


_step.defvjp(
    lambda cell, *arrays: (_step(cell, *arrays), arrays),
    lambda cell, arrays, directions: _gradients(cell, arrays, directions),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))  # its backward pass is traced only where it is needed
def _gates(cell, x, state, weights):
    return _plain_gates(cell, x, state, weights)


@functools.partial(jax.jit, static_argnums=0)  # traced once for all blocks alike
def _plain_gates(cell, x, state, weights):
    return _PLAIN[cell](x, state, weights)[1]


_gates.defvjp(
    lambda cell, *args: (_plain_gates(cell, *args), args),
    lambda cell, args, d: jax.vjp(functools.partial(_plain_gates, cell), *args)[1](d),
)
