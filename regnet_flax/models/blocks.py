"""Residual blocks, with and without a regulator (the paper's "RegNet module" and "bottleneck RegNet module").

A block maps the previous block's carry (X, state) to its own, so that a stage's blocks can run under `nn.scan`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from regnet_flax.models.initializers import INITIALIZERS, identity_of_first
from regnet_flax.models.layers import BatchNorm, Conv
from regnet_flax.models.ops import PLAIN, Ops, Value
from regnet_flax.models.regulators import Gates, Regulator, State

Array = jax.Array


class SqueezeExcite(nn.Module):
    """Scales each channel by a weight in (0, 1) that depends on all channels' means (Hu et al., arXiv 1709.01507).

    Attributes:
      squeezed: channels between the two dense layers; 0 means C / 16, at least one.
      dtype: the result's dtype; the means and dense layers are computed in float32 or wider.
      initial: initial values, a name in INITIALIZERS.
    """

    squeezed: int = 0
    dtype: Any = jnp.float32
    initial: str = "paper"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps (N, height, width, C) to the same shape."""
        channels, init = x.shape[-1], INITIALIZERS[self.initial]
        wide = jnp.promote_types(self.dtype, jnp.float32)
        squeezed = self.squeezed or max(1, channels // 16)

        def dense(features: int, fan_in: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=wide, kernel_init=init.dense, bias_init=init.bias(fan_in), name=name)

        means = x.mean((1, 2), dtype=wide)
        weights = nn.relu(dense(squeezed, channels, "fc1")(means))
        weights = nn.sigmoid(dense(channels, squeezed, "fc2")(weights))
        return (x.astype(wide) * weights[:, None, None, :]).astype(self.dtype)


def normalized_states(choice: str, state_names: Sequence[str]) -> dict[str, str]:
    """Maps each state array that is normalised to the name of its batch normalisation; see `Block`."""
    names = {"h": state_names[:1], "hc": state_names, "none": ()}[choice]
    return {name: f"bn_{name.lower()}" for name in names}


class Block(nn.Module):
    """The base of all blocks: makes the layers, the shortcut and the regulator.

    Attributes:
      features: n, the width of the 3×3 convolution.
      outputs: channels of the block's output; 0 means n, or 4n for a bottleneck.
      groups: groups of the 3×3 convolutions; a bottleneck has one such convolution.
      strides: the factor by which the block reduces height and width.
      cell: makes the block's regulator, given `name` or `parent`; None for a plain ResNet block.
      norm: makes a batch normalisation, given `name`, and `relu` if a ReLU follows.
      normalize_state: the part of the state that goes through ReLU(BN(·)): "h", H; "hc", all of it; or "none".
      replace: whether H replaces X2, instead of being fused with it.
      squeeze_excite: whether squeeze-and-excitation follows the last batch normalisation.
      shortcut: "B", a 1×1 convolution where the shape changes, or "A", no parameters: subsampled, then zero-padded.
      stride_at: which of the bottleneck's convolutions has the stride, "1x1" or "3x3".
      dtype: the dtype of convolutions and activations.
      initial: initial values, a name in INITIALIZERS.
      fuse_init: the fusing convolution's initial values: "he" (`initial`'s) or "identity", [identity, 0].
      dilations: dilation of the 3×3 convolutions up to and including the one with the stride, and of those after it.
      ops: the arithmetic.
    """

    features: int
    norm: Callable[..., BatchNorm]
    outputs: int = 0
    groups: int = 1
    strides: int = 1
    cell: Callable[..., Regulator] | None = None
    normalize_state: str = "h"
    replace: bool = False
    squeeze_excite: bool = False
    shortcut: str = "B"
    stride_at: str = "1x1"
    dtype: Any = jnp.float32
    initial: str = "paper"
    fuse_init: str = "he"
    dilations: tuple[int, int] = (1, 1)
    ops: Ops = PLAIN

    expansion: ClassVar[int] = 1
    # Whether the network has batch normalisation and ReLU before its head instead of after its stem.
    preactivated: ClassVar[bool] = False

    @nn.compact
    def __call__(self, carry: tuple[Value, State], shared: Any = None) -> tuple[tuple[Array, State], None]:
        """Runs the block.

        Args:
          carry: X1, (N, height, width, channels), and the regulator's state after the previous block, () without a
            regulator. If the stage shares batch normalisations of the state, the state ends with a dict from their
            names to their variables.
          shared: the parameters of the stage's shared regulator; None makes the block's own.

        Returns:
          (X1 of the next block, the new state), and None, which `nn.scan` requires.
        """
        x, state = carry
        y, state = self.branch(x, state, shared)
        y, state = self.rescale(y, state, shared)
        y = self.ops.add_relu(self._shortcut(x), y)
        self.sow("intermediates", "output", y)
        return (y, state), None

    @property
    def regulated(self) -> bool:
        """Whether the branch contains a regulator."""
        return self.cell is not None

    def branch(self, x: Value, state: State, shared: Any) -> tuple[Value, State]:
        """Computes the residual branch, up to its last batch normalisation."""
        raise NotImplementedError

    def rescale(self, y: Value, state: State, shared: Any) -> tuple[Value, State]:
        """Rescales the branch's output before the addition, with squeeze-and-excitation if the block has it."""
        del shared
        if self.squeeze_excite:
            y = SqueezeExcite(dtype=self.dtype, initial=self.initial, name="se")(self.ops.array(y))
        return y, state

    def conv(self, *args: Any, **options: Any) -> Array:
        return self.ops.array(self._conv(*args, **options))

    def _conv(self, x: Value, features: int, size: int, strides: int, name: str, dilation: int = 1) -> Value:
        init, groups = INITIALIZERS[self.initial].conv, self.groups if size == 3 else 1
        options = {"strides": strides, "dilation": dilation, "dtype": self.dtype, "ops": self.ops}
        return Conv(features, (size, size), init, feature_group_count=groups, **options, name=name).value(x)

    def bn(self, x: Array, name: str) -> Array:
        return self.norm(name=name)(x)

    def conv_bn(
        self,
        x: Value,
        features: int,
        size: int,
        strides: int,
        conv: str,
        bn: str,
        dilation: int = 1,
        relu: bool = False,
    ) -> Value:
        return self.norm(name=bn, relu=relu).value(self._conv(x, features, size, strides, conv, dilation))

    def conv_bn_relu(self, *args: Any, **options: Any) -> Value:
        return self.conv_bn(*args, **options, relu=True)

    def run_cell(self, x: Array, state: State, shared: Any) -> tuple[Regulator, State, Gates]:
        """Runs one step of the block's own cell, or of the stage's cell with the parameters `shared`."""
        assert self.cell is not None
        options = {"dilation": self.dilations[1]}
        if shared is None:
            cell = self.cell(**options, name="regulator")
            return cell, *cell(x, state)
        cell = self.cell(**options, parent=None)
        return cell, *cell.apply({"params": shared}, x, state)  # pyright: ignore[reportReturnType]

    def regulate(self, x: Value, state: State, shared: Any) -> State:
        norms: Any = None
        if state and isinstance(state[-1], dict):
            *rest, norms = state
            state = tuple(rest)
        seen = self.ops.array(x)
        self.sow("intermediates", "regulated", seen)
        cell, state, gates = self.run_cell(seen, state, shared)
        normalized = normalized_states(self.normalize_state, cell.state_names)
        new = []
        for name, array in zip(cell.state_names, state, strict=True):
            if norm := normalized.get(name):
                array, norms = self._normalize_state(norm, array, norms)
            new.append(array)
        state = tuple(new)
        self.sow("intermediates", "gates", gates)
        self.sow("intermediates", "state", state)
        return state if norms is None else (*state, norms)

    def _normalize_state(self, name: str, array: Array, norms: Any) -> tuple[Array, Any]:
        """Applies ReLU(BN(·)), the block's own or one of the stage's `norms`; returns `norms` with new statistics."""
        if norms is None:
            return self.norm(name=name, relu=True)(array), None
        alone = {"axis_name": None} if self.is_initializing() else {}  # init may run outside that axis
        norm = self.norm(relu=True, parent=None, **alone)
        y, updated = norm.apply(norms[name], array, mutable=["batch_stats"])
        return y, norms | {name: norms[name] | {"batch_stats": updated["batch_stats"]}}

    def fuse(self, x: Value, h: Array) -> Value:
        """Computes ReLU(BN(W * [X, H])), or returns H itself."""
        if self.replace:
            return h
        init = identity_of_first if self.fuse_init == "identity" else INITIALIZERS[self.initial].conv
        conv = Conv(self.features, (1, 1), init, dtype=self.dtype, ops=self.ops, name="conv_fuse")
        return self.norm(name="bn_fuse", relu=True).value(conv.value(self.ops.concatenate(x, h)))

    @property
    def width(self) -> int:
        """The number of output channels."""
        return self.outputs or self.features * self.expansion

    def _shortcut(self, x: Value) -> Array:
        features = self.width
        if self.strides == 1 and x.shape[-1] == features:
            return self.ops.array(x)
        if self.shortcut == "A":
            return zero_padded(self.ops.array(x), self.strides, features)
        return self.ops.array(self.conv_bn(x, features, 1, self.strides, "shortcut_conv", "shortcut_bn"))


def zero_padded(x: Array, strides: int, features: int) -> Array:
    """Computes He's shortcut without parameters: every `strides`-th row and column of x, and zeros for new channels."""
    if features < x.shape[-1]:
        raise ValueError(f"shortcut 'A' cannot go from {x.shape[-1]} to {features} channels: use 'B'")
    x = x[:, ::strides, ::strides]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, features - x.shape[-1])))


class BasicBlock(Block):
    """Two 3×3 convolutions; with a regulator, a 1×1 convolution between them fuses X2 with H."""

    def branch(self, x: Value, state: State, shared: Any) -> tuple[Value, State]:
        n, (before, after) = self.features, self.dilations
        x = self.conv_bn_relu(x, n, 3, self.strides, "conv1", "bn1", before)
        if self.regulated:
            state = self.regulate(x, state, shared)
            x = self.fuse(x, state[0])
        return self.conv_bn(x, n, 3, 1, "conv2", "bn2", after), state


class BottleneckBlock(Block):
    """1×1, 3×3 and 1×1 convolutions, the last to 4n channels; with a regulator, another 1×1 fuses X3 with H.

    If the 3×3 convolution has the stride, the regulator sees X2 subsampled by it: the same X2 as with the stride in the
    first 1×1 convolution.
    """

    expansion = 4

    def branch(self, x: Value, state: State, shared: Any) -> tuple[Value, State]:
        n, (before, after) = self.features, self.dilations
        first, second, dilation = (self.strides, 1, after) if self.stride_at == "1x1" else (1, self.strides, before)
        x = self.conv_bn_relu(x, n, 1, first, "conv1", "bn1")
        if self.regulated:
            seen = x if second == 1 else self.ops.array(x)[:, ::second, ::second]
            state = self.regulate(seen, state, shared)
        x = self.conv_bn_relu(x, n, 3, second, "conv2", "bn2", dilation)
        if self.regulated:
            x = self.fuse(x, state[0])
        return self.conv_bn(x, self.width, 1, 1, "conv3", "bn3"), state
