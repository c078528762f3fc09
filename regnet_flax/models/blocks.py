"""Residual blocks, with and without a regulator (the paper's "RegNet module" and "bottleneck RegNet module").

A block maps the carry (X, state) of the block before it to its own, so that a stage's blocks can run under `nn.scan`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from regnet_flax.models import convolution
from regnet_flax.models.convolution import Remade, array
from regnet_flax.models.initializers import INITIALIZERS
from regnet_flax.models.normalization import add_relu
from regnet_flax.models.regulators import Regulator, State

Array = jax.Array


def _concatenate(*arrays: Array) -> Array:
    return jnp.concatenate(arrays, -1)


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
      tuned: use the forms of `convolution` that are fast on a CPU.
    """

    features: int
    norm: Callable[..., nn.Module]
    strides: int = 1
    cell: Callable[..., Regulator] | None = None
    normalize_state: bool = True
    replace: bool = False
    squeeze_excite: bool = False
    shortcut: str = "B"
    stride_at: str = "1x1"
    dtype: Any = jnp.float32
    initial: str = "paper"
    tuned: bool = False

    expansion = 1

    @nn.compact
    def __call__(self, carry: tuple[Array | Remade, State], shared: Any = None) -> tuple[tuple[Array, State], None]:
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
        shortcut = self._shortcut(x)
        y = add_relu(shortcut, y) if self.tuned else nn.relu(shortcut + y)
        self.sow("intermediates", "output", y)
        return (y, state), None

    def branch(self, x: Array | Remade, state: State, shared: Any) -> tuple[Array, State]:
        """The residual branch, up to its last batch normalisation."""
        raise NotImplementedError

    def conv(self, x: Array | Remade, features: int, size: int, strides: int, name: str) -> Array:
        # "SAME" would pad asymmetrically at stride 2, unlike PyTorch.
        pad = (size // 2, size // 2)
        convolve = None
        if self.tuned:
            remade = x if isinstance(x, Remade) else None
            convolve = functools.partial(convolution.conv_general_dilated, remade=remade)
        return nn.Conv(
            features,
            (size, size),
            strides,
            padding=(pad, pad),
            use_bias=False,
            dtype=self.dtype,
            kernel_init=INITIALIZERS[self.initial].conv,
            conv_general_dilated=convolve,
            name=name,
        )(array(x))

    def conv_bn_relu(
        self, x: Array | Remade, features: int, size: int, strides: int, conv: str, bn: str
    ) -> Array | Remade:
        return self.norm(name=bn, relu=True).remade(self.conv(x, features, size, strides, conv))

    def regulate(self, x: Array, state: State, shared: Any) -> State:
        assert self.cell is not None
        if shared is None:
            state, gates = self.cell(name="regulator")(x, state)
        else:
            state, gates = self.cell(parent=None).apply({"params": shared}, x, state)
        h = self.norm(name="bn_h", relu=True)(state[0]) if self.normalize_state else state[0]
        self.sow("intermediates", "gates", gates)
        self.sow("intermediates", "state", (h, *state[1:]))
        return (h, *state[1:])

    def fuse(self, x: Array, h: Array) -> Array | Remade:
        """ReLU(BN(W * [X, H])), or H itself."""
        if self.replace:
            return h
        both = Remade(_concatenate(x, h), (x, h), _concatenate)
        return self.conv_bn_relu(both, self.features, 1, 1, "conv_fuse", "bn_fuse")

    def _shortcut(self, x: Array | Remade) -> Array:
        features = self.features * self.expansion
        if self.strides == 1 and array(x).shape[-1] == features:
            return array(x)
        if self.shortcut == "A":
            x = array(x)[:, :: self.strides, :: self.strides]
            if features < x.shape[-1]:
                raise ValueError(f"shortcut 'A' cannot go from {x.shape[-1]} to {features} channels: use 'B'")
            return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, features - x.shape[-1])))
        return self.norm(name="shortcut_bn")(self.conv(x, features, 1, self.strides, "shortcut_conv"))


class BasicBlock(Block):
    """Two 3×3 convolutions; with a regulator, a 1×1 convolution between them fuses X2 with H."""

    def branch(self, x: Array | Remade, state: State, shared: Any) -> tuple[Array, State]:
        n = self.features
        x = self.conv_bn_relu(x, n, 3, self.strides, "conv1", "bn1")
        if self.cell is not None:
            state = self.regulate(array(x), state, shared)
            x = self.fuse(array(x), state[0])
        return self.norm(name="bn2")(self.conv(x, n, 3, 1, "conv2")), state


class BottleneckBlock(Block):
    """1×1, 3×3 and 1×1 convolutions, the last to 4n channels; with a regulator, another 1×1 fuses X3 with H."""

    expansion = 4

    def branch(self, x: Array | Remade, state: State, shared: Any) -> tuple[Array, State]:
        n = self.features
        first, second = (self.strides, 1) if self.stride_at == "1x1" else (1, self.strides)
        x = self.conv_bn_relu(x, n, 1, first, "conv1", "bn1")
        if self.cell is not None:
            state = self.regulate(array(x), state, shared)
        x = self.conv_bn_relu(x, n, 3, second, "conv2", "bn2")
        if self.cell is not None:
            x = self.fuse(array(x), state[0])
        return self.norm(name="bn3")(self.conv(x, n * self.expansion, 1, 1, "conv3")), state
