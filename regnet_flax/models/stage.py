"""A stage: blocks of one spatial size, and what they share."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from regnet_flax.models.blocks import Block, normalized_states
from regnet_flax.models.ops import Value
from regnet_flax.models.regulators import State, check_cell

Array = jax.Array


class Stage(nn.Module):
    """A run of blocks of one spatial size, with one regulator running through them.

    The first block, which may change stride and width, is separate (`block1`). The others are alike and run under
    `nn.scan`, with their variables stacked on a leading axis (`blocks`), or in a Python loop (`block2`, `block3`, …).

    Attributes:
      block: makes a block, given `name` and, for the first, `strides`.
      length: the number of blocks.
      strides: stride of the first block.
      dilations: dilation of the 3×3 convolutions up to and including the one with the stride, and of those after it.
      shared: whether one regulator (`regulator`) serves all blocks, or each has its own.
      share_norm: whether one batch normalisation of the state (`bn_h`, and `bn_c` for an LSTM's C) serves all blocks.
      scan, unroll, remat: see RegNet.
    """

    block: functools.partial[Block]
    length: int
    strides: int
    dilations: tuple[int, int]
    shared: bool
    share_norm: bool
    scan: bool
    unroll: int | None
    remat: bool

    @nn.compact
    def __call__(self, x: Value) -> Array:
        """Maps (N, height, width, channels) to (N, ⌈height/strides⌉, ⌈width/strides⌉, the block's channels)."""
        block_type, options = self.block.func, self.block.keywords
        carry: tuple[Value, Any] = (x, ())
        shared, statistics = None, {}
        if options["cell"] is not None:
            cell = options["cell"](parent=None)
            n, height, width, _ = x.shape
            shape = (n, -(-height // self.strides), -(-width // self.strides), cell.features)
            state = cell.initial_state(shape, options["dtype"])
            carry = (x, state)
            if self.is_initializing():
                check_cell(cell, state, shared=self.shared)
            if self.shared:
                # Made here and passed to every block: as a submodule of the scanned block, the cell would silently get
                # one copy per step.
                shared = self.param("regulator", lambda key: cell.init(key, state[0], state).get("params", {}))
            if self.share_norm:
                norms, statistics = self._norms(normalized_states(options["normalize_state"], cell.state_names), state)
                carry = (x, (*state, norms))

        one = nn.remat(block_type) if self.remat else block_type
        carry, _ = one(**options, strides=self.strides, dilations=self.dilations, name="block1")(carry, shared)
        alike = options | {"dilations": self.dilations[1:] * 2}
        if not self.scan:
            for index in range(2, self.length + 1):
                carry, _ = one(**alike, name=f"block{index}")(carry, shared)
        elif self.length > 1:
            # A loop already keeps XLA from merging the recomputation with the first computation.
            unroll = min(self.unroll or self.length, self.length - 1)
            rolled = unroll < self.length - 1
            repeated = nn.remat(block_type, prevent_cse=not rolled) if self.remat else block_type
            blocks = nn.scan(
                repeated,
                variable_axes={"params": 0, "batch_stats": 0, "intermediates": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
                length=self.length - 1,
                unroll=unroll,
                # The check costs a second trace, in which initial values have always been drawn.
                check_constancy_invariants=self.is_initializing(),
            )
            carry, _ = blocks(**alike, name="blocks")(carry, shared)
        if not (options["norm"].keywords["use_running_average"] or self.is_initializing()):
            for name, variable in statistics.items():
                variable.value = carry[1][-1][name]["batch_stats"]
        return carry[0]

    def _norms(self, names: Mapping[str, str], state: State) -> tuple[dict[str, Any], dict[str, nn.Variable]]:
        """Makes the variables of the stage's batch normalisations of the state, and their statistics, by name."""
        norm = self.block.keywords["norm"](use_running_average=True, parent=None)
        made = norm.init(jax.random.key(0), state[0])  # ones and zeros
        norms, statistics = {}, {}
        for name in names.values():
            statistics[name] = self.variable("batch_stats", name, lambda: made["batch_stats"])
            params = self.param(name, lambda key: made["params"])
            norms[name] = {"params": params, "batch_stats": statistics[name].value}
        return norms, statistics
