"""RegNetY-400MF, the comparison model (Radosavovic et al., arXiv 2003.13678), as torchvision has it.

Another family called RegNet: no regulators, but a design space of grouped bottlenecks with squeeze-and-excitation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from regnet_flax.models.blocks import SqueezeExcite
from regnet_flax.models.normalization import BatchNorm

Array = jax.Array
INITIAL = "torchvision_regnet"


def stage_widths(
    depth: int = 16, w0: float = 48, wa: float = 27.89, wm: float = 2.09, group_width: int = 8
) -> list[tuple[int, int]]:
    """(width, blocks) of each stage, by the quantised linear rule of section 3.3 of the paper."""
    widths = []
    for block in range(depth):
        exponent = round(math.log((w0 + wa * block) / w0) / math.log(wm))
        width = round(w0 * wm**exponent / 8) * 8
        widths.append(max(group_width, round(width / group_width) * group_width))
    return [(width, widths.count(width)) for width in dict.fromkeys(widths)]


class Block(nn.Module):
    """1×1 (a), grouped 3×3 with the stride (b), squeeze-and-excitation, 1×1 (c); a projection where the shape changes.

    Attributes:
      features: channels of the output.
      strides: of the 3×3 convolution.
      group_width: its channels a group.
      squeezed: channels between the two layers of squeeze-and-excitation.
      norm: makes a batch normalisation, given `name`.
      dtype: of the arithmetic.
    """

    features: int
    strides: int
    group_width: int
    squeezed: int
    norm: Callable[..., nn.Module]
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """From (N, height, width, channels) to (N, ⌈height/strides⌉, ⌈width/strides⌉, features)."""
        features, strides = self.features, self.strides
        y = nn.relu(self._conv_bn(x, 1, 1, 1, "a"))
        y = nn.relu(self._conv_bn(y, 3, strides, features // self.group_width, "b"))
        y = SqueezeExcite(squeezed=self.squeezed, dtype=self.dtype, initial=INITIAL, name="se")(y)
        y = self._conv_bn(y, 1, 1, 1, "c")
        if strides != 1 or x.shape[-1] != features:
            x = self._conv_bn(x, 1, strides, 1, "proj")
        y = nn.relu(x + y)
        self.sow("intermediates", "output", y)
        return y

    def _conv_bn(self, x: Array, size: int, strides: int, groups: int, name: str) -> Array:
        return conv_bn(x, self.features, size, strides, groups, self.norm, self.dtype, name)


def conv_bn(
    x: Array, features: int, size: int, strides: int, groups: int, norm: Callable[..., nn.Module], dtype: Any, name: str
) -> Array:
    """A convolution `<name>_conv` and the batch normalisation `<name>_bn`."""
    pad = (size // 2, size // 2)
    y = nn.Conv(
        features,
        (size, size),
        strides,
        padding=(pad, pad),
        feature_group_count=groups,
        use_bias=False,
        dtype=dtype,
        # Of variance 2 / (height × width × outputs / groups), while Flax's fan-out knows no groups.
        kernel_init=nn.initializers.variance_scaling(2.0 * groups, "fan_out", "normal"),
        name=f"{name}_conv",
    )(x)
    return norm(name=f"{name}_bn")(y)


class RegNetY(nn.Module):
    """RegNetY-400MF by default.

    Attributes:
      num_classes: 0 gives the pooled features.
      depth, w0, wa, wm, group_width: of the design space; see stage_widths.
      se_ratio: channels between the layers of squeeze-and-excitation, as a part of those of the block's input.
      dtype: of the arithmetic; parameters and batch statistics are float32.
      axis_name: the pmap axis over which batch statistics are taken; None is this device's batch.
      features: return the stages' outputs instead of logits.
    """

    num_classes: int = 10
    depth: int = 16
    w0: float = 48
    wa: float = 27.89
    wm: float = 2.09
    group_width: int = 8
    se_ratio: float = 0.25
    dtype: Any = jnp.float32
    axis_name: str | None = None
    features: bool = False

    @nn.compact
    def __call__(self, images: Array, train: bool = False, features: bool | None = None) -> Any:
        """Classifies images; see RegNet."""
        wide = jnp.promote_types(self.dtype, jnp.float32)
        norm = functools.partial(BatchNorm, use_running_average=not train, dtype=self.dtype, axis_name=self.axis_name)
        x = nn.relu(conv_bn(images.astype(self.dtype), 32, 3, 2, 1, norm, self.dtype, "stem"))
        outputs = {}
        stages = stage_widths(self.depth, self.w0, self.wa, self.wm, self.group_width)
        for stage, (width, blocks) in enumerate(stages, start=1):
            for block in range(1, blocks + 1):
                x = Block(
                    features=width,
                    strides=2 if block == 1 else 1,
                    group_width=self.group_width,
                    squeezed=round(self.se_ratio * x.shape[-1]),
                    norm=norm,
                    dtype=self.dtype,
                    name=f"stage{stage}_block{block}",
                )(x)
            outputs[f"stage{stage}"] = x
        if self.features if features is None else features:
            return outputs
        pooled = x.mean((1, 2), dtype=wide)
        if not self.num_classes:
            return pooled
        return nn.Dense(self.num_classes, dtype=wide, kernel_init=nn.initializers.normal(0.01), name="head")(pooled)
