"""Residual blocks, with and without a regulator (the paper's "RegNet module" and "bottleneck RegNet module").

A block maps the carry (X, state) of the block before it to its own, so that a stage's blocks can run under `nn.scan`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from regnet_flax.models.initializers import INITIALIZERS, identity_of_first
from regnet_flax.models.layers import BatchNorm, Conv
from regnet_flax.models.ops import PLAIN, Ops, Value
from regnet_flax.models.regulators import Regulator, State

Array = jax.Array


class SqueezeExcite(nn.Module):
    """Scales each channel by a weight in (0, 1) that depends on all channels' means (Hu et al., arXiv 1709.01507).

    Attributes:
      squeezed: channels between the two dense layers; 0 stands for C / 16, at least one.
      dtype: of the result; the means and dense layers are computed in float32 or wider.
      initial: initial values, a name in INITIALIZERS.
    """

    squeezed: int = 0
    dtype: Any = jnp.float32
    initial: str = "paper"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """From (N, height, width, C) to the same."""
        channels, init = x.shape[-1], INITIALIZERS[self.initial]
        wide = jnp.promote_types(self.dtype, jnp.float32)
        squeezed = self.squeezed or max(1, channels // 16)

        def dense(features: int, fan_in: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=wide, kernel_init=init.dense, bias_init=init.bias(fan_in), name=name)

        means = x.mean((1, 2), dtype=wide)
        weights = nn.relu(dense(squeezed, channels, "fc1")(means))
        weights = nn.sigmoid(dense(channels, squeezed, "fc2")(weights))
        return (x.astype(wide) * weights[:, None, None, :]).astype(self.dtype)


class Block(nn.Module):
    """What both blocks have in common: the layers' make, the shortcut and the regulator.

    Attributes:
      features: n, the width of the 3×3 convolution.
      strides: by which the block reduces height and width.
      cell: makes the block's regulator, given `name` or `parent`; None for a plain ResNet block.
      norm: makes a batch normalisation, given `name`, and `relu` where a ReLU follows.
      normalize_state: whether H goes through ReLU(BN(·)) on its way.
      replace: whether H takes the place of X2, instead of being fused with it.
      squeeze_excite: whether squeeze-and-excitation follows the last batch normalisation.
      shortcut: "B", a 1×1 convolution where the shape changes, or "A", no parameters: subsampled, then zero-padded.
      stride_at: the bottleneck's convolution that carries the stride, "1x1" or "3x3".
      dtype: of the convolutions and activations.
      initial: initial values, a name in INITIALIZERS.
      fuse_init: where the fusing convolution starts, "he" (`initial`'s) or "identity", [identity, 0].
      dilations: of the 3×3 convolutions before the place of the stride, its own too, and of those after it.
      ops: the arithmetic.
    """

    features: int
    norm: Callable[..., BatchNorm]
    strides: int = 1
    cell: Callable[..., Regulator] | None = None
    normalize_state: bool = True
    replace: bool = False
    squeeze_excite: bool = False
    shortcut: str = "B"
    stride_at: str = "1x1"
    dtype: Any = jnp.float32
    initial: str = "paper"
    fuse_init: str = "he"
    dilations: tuple[int, int] = (1, 1)
    ops: Ops = PLAIN

    expansion = 1

    @nn.compact
    def __call__(self, carry: tuple[Value, State], shared: Any = None) -> tuple[tuple[Array, State], None]:
        """One block.

        Args:
          carry: X1, (N, height, width, channels), and the regulator's state of the block before, () without one.
          shared: the parameters of the stage's shared regulator; None makes the block's own.

        Returns:
          (X1 of the next block, the new state), and None, as `nn.scan` asks.
        """
        x, state = carry
        y, state = self.branch(x, state, shared)
        if self.squeeze_excite:
            y = SqueezeExcite(dtype=self.dtype, initial=self.initial, name="se")(y)
        y = self.ops.add_relu(self._shortcut(x), y)
        self.sow("intermediates", "output", y)
        return (y, state), None

    def branch(self, x: Value, state: State, shared: Any) -> tuple[Array, State]:
        """The residual branch, up to its last batch normalisation."""
        raise NotImplementedError

    def conv(self, x: Value, features: int, size: int, strides: int, name: str, dilation: int = 1) -> Array:
        init = INITIALIZERS[self.initial].conv
        options = {"strides": strides, "dilation": dilation, "dtype": self.dtype, "ops": self.ops}
        return Conv(features, (size, size), init, **options, name=name)(x)

    def bn(self, x: Array, name: str) -> Array:
        return self.norm(name=name)(x)

    def conv_bn_relu(
        self, x: Value, features: int, size: int, strides: int, conv: str, bn: str, dilation: int = 1
    ) -> Value:
        return self.norm(name=bn, relu=True).value(self.conv(x, features, size, strides, conv, dilation))

    def regulate(self, x: Value, state: State, shared: Any) -> State:
        assert self.cell is not None
        options = {"dilation": self.dilations[1]}
        if shared is None:
            state, gates = self.cell(**options, name="regulator")(self.ops.array(x), state)
        else:
            cell = self.cell(**options, parent=None)
            state, gates = cell.apply({"params": shared}, self.ops.array(x), state)
        h = self.norm(name="bn_h", relu=True)(state[0]) if self.normalize_state else state[0]
        self.sow("intermediates", "gates", gates)
        self.sow("intermediates", "state", (h, *state[1:]))
        return (h, *state[1:])

    def fuse(self, x: Value, h: Array) -> Value:
        """ReLU(BN(W * [X, H])), or H itself."""
        if self.replace:
            return h
        init = identity_of_first if self.fuse_init == "identity" else INITIALIZERS[self.initial].conv
        conv = Conv(self.features, (1, 1), init, dtype=self.dtype, ops=self.ops, name="conv_fuse")
        return self.norm(name="bn_fuse", relu=True).value(conv(self.ops.concatenate(x, h)))

    def _shortcut(self, x: Value) -> Array:
        features = self.features * self.expansion
        if self.strides == 1 and x.shape[-1] == features:
            return self.ops.array(x)
        if self.shortcut == "A":
            if features < x.shape[-1]:
                raise ValueError(f"shortcut 'A' cannot go from {x.shape[-1]} to {features} channels: use 'B'")
            x = self.ops.array(x)[:, :: self.strides, :: self.strides]
            return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, features - x.shape[-1])))
        return self.bn(self.conv(x, features, 1, self.strides, "shortcut_conv"), "shortcut_bn")


class BasicBlock(Block):
    """Two 3×3 convolutions; with a regulator, a 1×1 convolution between them fuses X2 with H."""

    def branch(self, x: Value, state: State, shared: Any) -> tuple[Array, State]:
        n, (before, after) = self.features, self.dilations
        x = self.conv_bn_relu(x, n, 3, self.strides, "conv1", "bn1", before)
        if self.cell is not None:
            state = self.regulate(x, state, shared)
            x = self.fuse(x, state[0])
        return self.bn(self.conv(x, n, 3, 1, "conv2", after), "bn2"), state


class BottleneckBlock(Block):
    """1×1, 3×3 and 1×1 convolutions, the last to 4n channels; with a regulator, another 1×1 fuses X3 with H."""

    expansion = 4

    def branch(self, x: Value, state: State, shared: Any) -> tuple[Array, State]:
        n, (before, after) = self.features, self.dilations
        first, second, dilation = (self.strides, 1, after) if self.stride_at == "1x1" else (1, self.strides, before)
        x = self.conv_bn_relu(x, n, 1, first, "conv1", "bn1")
        if self.cell is not None:
            state = self.regulate(x, state, shared)
        x = self.conv_bn_relu(x, n, 3, second, "conv2", "bn2", dilation)
        if self.cell is not None:
            x = self.fuse(x, state[0])
        return self.bn(self.conv(x, n * self.expansion, 1, 1, "conv3"), "bn3"), state
