"""RegNetY-400MF, the comparison model (Radosavovic et al., arXiv 2003.13678), as in torchvision.

This is another family called RegNet: a design space of grouped bottlenecks with squeeze-and-excitation, without
regulators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from regnet_flax.models.backbone import StageInfo, chosen
from regnet_flax.models.blocks import SqueezeExcite
from regnet_flax.models.layers import BatchNorm, Conv, norm_of
from regnet_flax.models.ops import PLAIN, Ops, Value

Array = jax.Array
INITIAL = "torchvision_regnet"


def stage_widths(
    depth: int = 16, w0: float = 48, wa: float = 27.89, wm: float = 2.09, group_width: int = 8
) -> list[tuple[int, int]]:
    """Returns (width, blocks) of each stage, by the quantised linear rule of section 3.3 of the paper."""
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
      strides: stride of the 3×3 convolution.
      group_width: its channels per group.
      squeezed: channels between the two layers of squeeze-and-excitation.
      norm: makes a batch normalisation, given `name`.
      dtype: dtype of the arithmetic.
      ops: the arithmetic.
    """

    features: int
    strides: int
    group_width: int
    squeezed: int
    norm: Callable[..., BatchNorm]
    dtype: Any
    ops: Ops = PLAIN

    @nn.compact
    def __call__(self, x: Value) -> Array:
        """Maps (N, height, width, channels) to (N, ⌈height/strides⌉, ⌈width/strides⌉, features)."""
        features, strides = self.features, self.strides
        options = {"norm": self.norm, "dtype": self.dtype, "ops": self.ops}
        y = conv_bn(x, features, 1, "a", **options, relu=True)
        y = conv_bn(y, features, 3, "b", **options, strides=strides, groups=features // self.group_width, relu=True)
        y = SqueezeExcite(squeezed=self.squeezed, dtype=self.dtype, initial=INITIAL, name="se")(self.ops.array(y))
        y = conv_bn(y, features, 1, "c", **options)
        if strides != 1 or x.shape[-1] != features:
            x = conv_bn(x, features, 1, "proj", **options, strides=strides)
        y = self.ops.add_relu(x, y)
        self.sow("intermediates", "output", y)
        return y


def conv_bn(
    x: Value,
    features: int,
    size: int,
    name: str,
    *,
    norm: Callable[..., BatchNorm],
    dtype: Any,
    ops: Ops,
    strides: int = 1,
    groups: int = 1,
    relu: bool = False,
) -> Value:
    """Applies a convolution `<name>_conv` and a batch normalisation `<name>_bn`, and a ReLU if requested."""
    # The variance is 2 / (height × width × outputs / groups); Flax's fan-out ignores groups.
    init = nn.initializers.variance_scaling(2.0 * groups, "fan_out", "normal")
    options = {"strides": strides, "feature_group_count": groups, "dtype": dtype, "ops": ops}
    y = Conv(features, (size, size), init, **options, name=f"{name}_conv").value(x)
    return norm(name=f"{name}_bn", relu=relu).value(y)


class RegNetY(nn.Module):
    """RegNetY-400MF by default.

    Attributes:
      num_classes: 0 gives the pooled features.
      depth, w0, wa, wm, group_width: parameters of the design space; see stage_widths.
      se_ratio: channels between the layers of squeeze-and-excitation, as a fraction of the block's input channels.
      dtype: the dtype of the arithmetic; parameters and batch statistics are float32.
      axis_name: the pmap axis over which batch statistics are computed; None means this device's batch.
      features: return features instead of logits: True, the stages' outputs, or some names of `stage_info`.
      frozen_batch_stats: use the running batch statistics in training too, and do not change them.
      ops: the arithmetic.
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
    features: bool | tuple[str, ...] = False
    frozen_batch_stats: bool = False
    ops: Ops = PLAIN

    def _stages(self) -> list[tuple[int, int]]:
        return stage_widths(self.depth, self.w0, self.wa, self.wm, self.group_width)

    @property
    def stage_info(self) -> tuple[StageInfo, ...]:
        """The stem and the stages: name, channels and stride of each."""
        stages = enumerate(self._stages(), start=1)
        return StageInfo("stem", 32, 2), *(StageInfo(f"stage{n}", width, 2 ** (n + 1)) for n, (width, _) in stages)

    @nn.compact
    def __call__(self, images: Array, train: bool = False, features: bool | str | Sequence[str] | None = None) -> Any:
        """Classifies images; see RegNet."""
        wide = jnp.promote_types(self.dtype, jnp.float32)
        infos = self.stage_info
        wanted = chosen(self.features if features is None else features, infos)
        norm = norm_of(self, train)
        options = {"norm": norm, "dtype": self.dtype, "ops": self.ops}
        x = conv_bn(images.astype(self.dtype), infos[0].channels, 3, "stem", **options, strides=2, relu=True)
        outputs = {"stem": self.ops.array(x)} if "stem" in wanted else {}
        for info, (width, blocks) in zip(infos[1:], self._stages(), strict=True):
            if wanted and len(outputs) == len(wanted):
                break
            for block in range(1, blocks + 1):
                x = Block(
                    features=width,
                    strides=2 if block == 1 else 1,
                    group_width=self.group_width,
                    squeezed=round(self.se_ratio * x.shape[-1]),
                    **options,
                    name=f"{info.name}_block{block}",
                )(x)
            if info.name in wanted:
                outputs[info.name] = x
        if wanted:
            return outputs
        pooled = self.ops.array(x).mean((1, 2), dtype=wide)
        if not self.num_classes:
            return pooled
        return nn.Dense(self.num_classes, dtype=wide, kernel_init=nn.initializers.normal(0.01), name="head")(pooled)
