"""RLA-Net, a comparison model (Zhao et al., arXiv 2110.11852): a narrow recurrent state beside a ResNet's bottlenecks.

The state h passes through all stages; every block uses it as a second input, and adds to it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from regnet_flax.models.backbone import StageInfo, chosen
from regnet_flax.models.blocks import BottleneckBlock
from regnet_flax.models.initializers import INITIALIZERS
from regnet_flax.models.layers import Conv, norm_of
from regnet_flax.models.ops import PLAIN, Ops, Value

Array = jax.Array


class RLABlock(BottleneckBlock):
    """A bottleneck F whose first 1×1 convolution takes [x, h]; y = F([x, h]) before the addition; see Block.

    h' = W_rec * tanh(BN(h + W_out * y)); if the stride is 2, h is first averaged over 2×2 pixels.
    """

    @nn.compact
    def __call__(self, x: Value, h: Array, out: Conv, rec: Conv) -> tuple[Array, Array]:  # pyright: ignore
        """Runs the block.

        Args:
          x: (N, height, width, channels).
          h: (N, height, width, k).
          out, rec: the stage's W_out, to k channels, and W_rec.

        Returns:
          The next block's x and h.
        """
        y = self.ops.array(self.branch(self.ops.concatenate(self.ops.array(x), h), (), None)[0])
        x = self.ops.add_relu(self._shortcut(x), y)
        self.sow("intermediates", "output", x)
        if self.strides > 1:
            odd = [(0, size % self.strides) for size in h.shape[1:3]]
            window = (self.strides, self.strides)
            h = nn.avg_pool(h, window, window, odd, count_include_pad=False)  # pyright: ignore[reportArgumentType]
        return x, rec(jnp.tanh(self.bn(h + out(y), "bn_h")))


class RLAStage(nn.Module):
    """The blocks of one spatial size, with their W_out (`conv_out`) and W_rec (`conv_rec`).

    Attributes:
      block: makes a block, given `name` and, for the first, `strides`.
      conv: makes a convolution, given channels, size and `name`.
      length: the number of blocks.
      strides: stride of the first block.
      channels: k, the channels of h.
    """

    block: Callable[..., RLABlock]
    conv: Callable[..., Conv]
    length: int
    strides: int
    channels: int

    @nn.compact
    def __call__(self, x: Value, h: Array) -> tuple[Array, Array]:
        out = self.conv(self.channels, (1, 1), name="conv_out")
        rec = self.conv(self.channels, (3, 3), name="conv_rec")
        for index in range(1, self.length + 1):
            block = self.block(strides=self.strides if index == 1 else 1, name=f"block{index}")
            x, h = block(x, h, out, rec)
        return self.block.keywords["ops"].array(x), h  # pyright: ignore[reportFunctionMemberAccess]


class RLANet(nn.Module):
    """RLA-ResNet-50 by default. The head's input is the mean of [x, ReLU(BN(h))].

    Attributes:
      stage_sizes: the number of blocks of each stage.
      num_classes: 0 gives the pooled features.
      width: channels of the stem and n of the first stage; n doubles from stage to stage.
      state_channels: k.
      bottleneck_stride: the convolution that has the stride, "1x1" or "3x3".
      initial: initial values, "paper" or "torch".
      dtype: the dtype of the arithmetic; parameters and batch statistics are float32.
      axis_name: the pmap axis over which batch statistics are computed; None means this device's batch.
      features: return features instead of logits: True, the stages' outputs x, or some names of `stage_info`.
      frozen_batch_stats: use the running batch statistics in training too, and do not change them.
      ops: the arithmetic.
    """

    stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
    num_classes: int = 10
    width: int = 64
    state_channels: int = 32
    bottleneck_stride: str = "1x1"
    initial: str = "paper"
    dtype: Any = jnp.float32
    axis_name: str | None = None
    features: bool | tuple[str, ...] = False
    frozen_batch_stats: bool = False
    ops: Ops = PLAIN

    @property
    def stage_info(self) -> tuple[StageInfo, ...]:
        """The stem and the stages: name, channels and stride of each."""
        stages = range(len(self.stage_sizes))
        return StageInfo("stem", self.width, 4), *(
            StageInfo(f"stage{s + 1}", self.width * 2**s * RLABlock.expansion, 4 * 2**s) for s in stages
        )

    @nn.compact
    def __call__(self, images: Array, train: bool = False, features: bool | str | Sequence[str] | None = None) -> Any:
        """Classifies images; see RegNet."""
        init, wide = INITIALIZERS[self.initial], jnp.promote_types(self.dtype, jnp.float32)
        wanted = chosen(self.features if features is None else features, self.stage_info)
        norm = norm_of(self, train)
        conv = functools.partial(Conv, kernel_init=init.conv, dtype=self.dtype, ops=self.ops)
        x = conv(self.width, (7, 7), strides=2, name="conv1")(images.astype(self.dtype))
        x = self.ops.array(norm(name="bn1", relu=True).value(x))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]
        h = jnp.zeros((*x.shape[:-1], self.state_channels), self.dtype)
        outputs = {"stem": x} if "stem" in wanted else {}
        for stage, (length, info) in enumerate(zip(self.stage_sizes, self.stage_info[1:], strict=True)):
            if wanted and len(outputs) == len(wanted):
                break
            block = functools.partial(
                RLABlock,
                features=self.width * 2**stage,
                norm=norm,
                stride_at=self.bottleneck_stride,
                initial=self.initial,
                dtype=self.dtype,
                ops=self.ops,
            )
            strides = 2 if stage else 1
            x, h = RLAStage(block, conv, length, strides, self.state_channels, name=info.name)(x, h)
            if info.name in wanted:
                outputs[info.name] = x
        if wanted:
            return outputs
        h = norm(name="bn_h", relu=True)(h)
        pooled = jnp.concatenate([x, h], -1).mean((1, 2), dtype=wide)
        if not self.num_classes:
            return pooled
        bias = init.bias(pooled.shape[-1])
        return nn.Dense(self.num_classes, dtype=wide, kernel_init=init.dense, bias_init=bias, name="head")(pooled)
