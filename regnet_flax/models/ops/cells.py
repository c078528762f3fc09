"""The cells' equations, given the convolution of X with whatever stands beside it; σ is the sigmoid."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array
State = tuple[Array, ...]
Gates = dict[str, Array]
# Maps H, or what replaces it, to W[X, H] + b of each gate from the first up to, but not including, the last.
Convolve = Callable[[Array, int, int], list[Array]]
# From X, H and the kernels of some gates to their sums, as `plain.separable`.
Separable = Callable[[Array, Array, Array, Array], Array]


def rnn(convolve: Convolve, state: State) -> tuple[State, Gates]:
    """H' = tanh(W[X, H] + b)."""
    (a,) = convolve(state[0], 0, 1)
    h = jnp.tanh(a)
    return (h,), {"h": h}


def gru(convolve: Convolve, state: State) -> tuple[State, Gates]:
    """z, r = σ(W[X, H] + b); H̃ = tanh(Wh[X, r⊙H] + bh); H' = (1 − z)⊙H + z⊙H̃."""
    (h,) = state
    z, r = (jax.nn.sigmoid(a) for a in convolve(h, 0, 2))
    (a,) = convolve((r * h).astype(h.dtype), 2, 3)
    candidate = jnp.tanh(a)
    return ((1 - z) * h + z * candidate,), {"z": z, "r": r, "h": candidate}


def lstm(convolve: Convolve, state: State) -> tuple[State, Gates]:
    """i, f, o = σ(W[X, H] + b); g = tanh(Wg[X, H] + bg); C' = f⊙C + i⊙g; H' = o⊙tanh(C')."""
    h, c = state
    a, b, d, e = convolve(h, 0, 4)
    i, f, o, g = jax.nn.sigmoid(a), jax.nn.sigmoid(b), jax.nn.sigmoid(d), jnp.tanh(e)
    c = f * c + i * g
    return (o * jnp.tanh(c), c), {"i": i, "f": f, "o": o, "g": g}


def separable_sums(
    separable: Separable, x: Array, h: Array, weights: tuple[Array, ...], first: int, last: int
) -> list[Array]:
    """W[x, h] + b for the gates from `first` up to `last`, not included.

    Args:
      separable: the convolution.
      x, h: (N, height, width, n), of one dtype.
      weights: (2, gates, n), (3, 3, gates, n) and (gates, n), of any dtype.

    Returns:
      (N, height, width, n) for each gate, in float32 or wider.
    """
    *kernels, bias = (w[..., first:last, :] for w in weights)
    sums = separable(x, h, *(kernel.astype(x.dtype) for kernel in kernels))
    sums = sums + bias.astype(sums.dtype)
    return [sums[..., gate, :] for gate in range(last - first)]


def separable_step(
    equations: Callable[[Convolve, State], tuple[State, Gates]],
    separable: Separable,
    x: Array,
    state: State,
    weights: tuple[Array, ...],
) -> tuple[State, Gates]:
    """One step of a cell by its equations, with the separable convolution; see Ops."""
    return equations(lambda h, first, last: separable_sums(separable, x, h, weights, first, last), state)
