"""DIANet, a comparison model (Huang et al., arXiv 1905.10671): one LSTM of vectors per stage weights the channels.

Its recurrence runs along the depth like a regulator's, but it sees only global means, and scales the residual branch.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from regnet_flax.models.blocks import BasicBlock, Block, BottleneckBlock
from regnet_flax.models.initializers import INITIALIZERS
from regnet_flax.models.ops import Value
from regnet_flax.models.ops.cells import Gates
from regnet_flax.models.regulators import Regulator, State

Array = jax.Array


class DIALSTM(Regulator):
    """i, f, o, g = A_x(y) + A_h(h); c' = σ(f)⊙c + σ(i)⊙tanh(g); h' = σ(o)⊙σ(c').

    A is a dense layer from C to C / 4, a ReLU and a dense layer to 4C, both biased. y, h and c are (N, C).
    """

    gate_names = ("i", "f", "o", "g")
    state_names = ("H", "C")

    @classmethod
    def initial_state(cls, shape: tuple[int, ...], dtype: Any = jnp.float32) -> State:
        """Returns zeros (N, C), for a feature map's shape (N, height, width, C) or for (N, C)."""
        return super().initial_state((shape[0], shape[-1]), dtype)

    def _weights(self) -> tuple[Array, ...]:
        return ()

    def step(self, x: Array, state: State, weights: tuple[Array, ...]) -> tuple[State, Gates]:
        h, c = state
        i, f, o, g = jnp.split(self._layers(x, "x") + self._layers(h, "h"), 4, -1)
        i, f, o, g = nn.sigmoid(i), nn.sigmoid(f), nn.sigmoid(o), jnp.tanh(g)
        c = f * c + i * g
        return (o * nn.sigmoid(c), c), {"i": i, "f": f, "o": o, "g": g}

    def _layers(self, x: Array, name: str) -> Array:
        n, squeezed, init = self.features, max(1, self.features // 4), INITIALIZERS[self.initial]
        wide = jnp.promote_types(self.dtype, jnp.float32)
        options = {"dtype": wide, "kernel_init": init.dense}
        x = nn.Dense(squeezed, bias_init=init.bias(n), name=f"{name}1", **options)(x)
        return nn.Dense(4 * n, bias_init=init.bias(squeezed), name=f"{name}2", **options)(nn.relu(x))


class DIABlock(Block):
    """x' = ReLU(shortcut(x) + F(x)⊙h'), where the cell computes h' from the global means of F(x); see Block."""

    @property
    def regulated(self) -> bool:
        return False

    def rescale(self, y: Value, state: State, shared: Any) -> tuple[Value, State]:
        if self.cell is None:
            return y, state
        y = self.ops.array(y)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        _, state, _ = self.run_cell(y.mean((1, 2), dtype=wide), state, shared)
        return y * state[0][:, None, None, :], state


class DIABasicBlock(DIABlock, BasicBlock):
    """Two 3×3 convolutions."""


class DIABottleneckBlock(DIABlock, BottleneckBlock):
    """1×1, 3×3 and 1×1 convolutions."""
