"""ResNet and RegNet: stem, stages of blocks under `nn.scan`, head (arXiv 2101.00590 and arXiv 1512.03385)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from regnet_flax.models.backbone import StageInfo, chosen
from regnet_flax.models.blocks import BasicBlock, Block, BottleneckBlock
from regnet_flax.models.families.dianet import DIALSTM, DIABasicBlock, DIABlock, DIABottleneckBlock
from regnet_flax.models.families.preact import PreactBlock
from regnet_flax.models.initializers import INITIALIZERS
from regnet_flax.models.layers import BatchNorm, Conv, norm_of
from regnet_flax.models.ops import PLAIN, Ops, Value
from regnet_flax.models.regulators import REGULATORS, ReplacingConvGRU
from regnet_flax.models.stage import Stage

Array = jax.Array

# The cells of the paper, of a public project, and of DIANet.
CELLS = REGULATORS | {"replacing_convgru": ReplacingConvGRU, "dia": DIALSTM}
BLOCKS: dict[str, type[Block]] = {
    "basic": BasicBlock,
    "bottleneck": BottleneckBlock,
    "preact": PreactBlock,
    "dia_basic": DIABasicBlock,
    "dia_bottleneck": DIABottleneckBlock,
}
STEM_STRIDES = {"cifar": 1, "cifar_pool": 2, "imagenet": 4}


class RegNet(nn.Module):
    """A ResNet in which each stage may have a regulator beside its blocks.

    Attributes:
      stage_sizes: the number of blocks of each stage.
      num_classes: 0 gives the pooled features.
      block: a key of BLOCKS.
      stem: "cifar", a 3×3 convolution; "cifar_pool", that and a 3×3 max-pool at stride 2; or "imagenet", 7×7 at stride
        2 and that max-pool.
      width: n of the first stage; n doubles from stage to stage.
      stem_width: channels of the stem; None means `width`.
      groups, width_per_group: for the bottlenecks' 3×3 convolutions, as in torchvision: their channels are
        n · width_per_group / 64, rounded down, times groups.
      regulator: a key of CELLS; None means a plain ResNet, and then the next seven attributes have no effect.
      kernel: the regulators' convolutions, "separable" or "dense".
      regulator_grouping: how separable regulators group channels, "pairs" or "contiguous"; see Regulator.
      share_regulator: one regulator for all blocks of a stage, or one per block; the state is passed on in both cases.
      regulated_stages: the stages, from 1, that have a regulator; None means all.
      normalize_state, replace: see Block.
      share_state_norm: one batch normalisation of the state for all blocks of a stage, or one per block.
      squeeze_excite: whether each block ends in squeeze-and-excitation.
      shortcut: "B", a 1×1 convolution where the shape changes, or "A", without parameters.
      bottleneck_stride: which convolution of a bottleneck has the stride, "1x1" (He et al. 2015) or "3x3"
        (torchvision).
      initial: initial values, "paper" or "torch".
      fuse_init: initial values of the convolutions that fuse X with H: "he", as in `initial`, or "identity",
        [identity, 0], which passes X through and ignores H.
      scan: run a stage's blocks under `nn.scan`; False means a Python loop over individually named blocks.
      unroll: blocks per step of the scan; None means all of them.
      remat: recompute each block in the backward pass instead of storing its intermediate results.
      ops: the arithmetic.
      dtype: the dtype of the arithmetic; parameters and batch statistics are float32.
      axis_name: the pmap axis over which batch statistics are computed; None means this device's batch.
      features: return features instead of logits: True, the stages' outputs, or some names of `stage_info`.
      output_stride: the largest stride of a stage; where strides would exceed it, the following convolutions are
        dilated instead, so that the weights keep their receptive field. None means no limit.
      frozen_batch_stats: use the running batch statistics in training too, and do not change them.
    """

    stage_sizes: tuple[int, ...]
    num_classes: int = 10
    block: str = "basic"
    stem: str = "cifar"
    width: int = 16
    stem_width: int | None = None
    groups: int = 1
    width_per_group: int = 64
    regulator: str | None = None
    kernel: str = "separable"
    regulator_grouping: str = "pairs"
    share_regulator: bool = True
    regulated_stages: tuple[int, ...] | None = None
    normalize_state: str = "h"
    share_state_norm: bool = False
    replace: bool = False
    squeeze_excite: bool = False
    shortcut: str = "B"
    bottleneck_stride: str = "1x1"
    initial: str = "paper"
    fuse_init: str = "he"
    scan: bool = True
    unroll: int | None = None
    remat: bool = False
    ops: Ops = PLAIN
    dtype: Any = jnp.float32
    axis_name: str | None = None
    features: bool | tuple[str, ...] = False
    output_stride: int | None = None
    frozen_batch_stats: bool = False

    def _regulates(self, stage: int) -> bool:
        return self.regulated_stages is None or stage in self.regulated_stages

    @property
    def stage_info(self) -> tuple[StageInfo, ...]:
        """The stem and the stages: name, channels, stride and dilation of each.

        Raises:
          ValueError: `output_stride` is not the stem's stride times a power of two.
        """
        stride, dilation = STEM_STRIDES[self.stem], 1
        bound = self.output_stride or stride * 2 ** len(self.stage_sizes)
        if bound < stride or (bound // stride).bit_count() != 1 or bound % stride:
            raise ValueError(f"output_stride is {bound}: it must be {stride}, the stem's, or {stride} × 2, × 4 or more")
        stages = [StageInfo("stem", self.stem_width or self.width, stride)]
        for stage in range(1, len(self.stage_sizes) + 1):
            if stage > 1 and stride < bound:
                stride *= 2
            elif stage > 1:
                dilation *= 2
            n = self.width * 2 ** (stage - 1)
            stages.append(StageInfo(f"stage{stage}", n * BLOCKS[self.block].expansion, stride, dilation))
        return tuple(stages)

    @nn.compact
    def __call__(self, images: Array, train: bool = False, features: bool | str | Sequence[str] | None = None) -> Any:
        """Classifies images.

        Args:
          images: (N, height, width, channels), normalised.
          train: use the statistics of this batch, and update the running ones.
          features: overrides the attribute.

        Returns:
          Logits (N, num_classes); the pooled features (N, channels) if num_classes is 0; or, with `features`, a dict
          from the requested names to (N, height, width, channels). The network stops after the last of them. Logits
          and pooled features are float32.

        Raises:
          ValueError: there is no feature of that name.
        """
        init, wide = INITIALIZERS[self.initial], jnp.promote_types(self.dtype, jnp.float32)
        infos = self.stage_info
        wanted = chosen(self.features if features is None else features, infos)
        norm = norm_of(self, train)
        size, strides = (7, 2) if self.stem == "imagenet" else (3, 1)
        channels, preactivated = infos[0].channels, BLOCKS[self.block].preactivated
        conv = Conv(channels, (size, size), init.conv, strides, dtype=self.dtype, ops=self.ops, name="conv1")
        x: Value = conv.value(images.astype(self.dtype))
        if not preactivated:
            x = norm(name="bn1", relu=True).value(x)
        if self.stem != "cifar":
            x = nn.max_pool(self.ops.array(x), (3, 3), (2, 2), ((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]

        outputs = {"stem": self.ops.array(x)} if "stem" in wanted else {}
        for stage, length in enumerate(self.stage_sizes, start=1):
            before, info = infos[stage - 1 : stage + 1]
            if wanted and len(outputs) == len(wanted):
                break
            x = Stage(
                block=self._block(stage, norm),
                length=length,
                strides=info.stride // before.stride,
                dilations=(before.dilation, info.dilation),
                shared=self.share_regulator,
                share_norm=self.share_state_norm and not issubclass(BLOCKS[self.block], DIABlock),  # it normalises none
                scan=self.scan,
                unroll=self.unroll,
                remat=self.remat,
                name=info.name,
            )(x)
            if info.name in wanted:
                outputs[info.name] = x
        if wanted:
            return outputs
        if preactivated:
            x = norm(name="bn_last", relu=True).value(x)
        pooled = self.ops.array(x).mean((1, 2), dtype=wide)
        if not self.num_classes:
            return pooled
        return nn.Dense(
            self.num_classes,
            dtype=wide,
            kernel_init=init.dense,
            bias_init=init.bias(pooled.shape[-1]),
            name="head",
        )(pooled)

    def _block(self, stage: int, norm: functools.partial[BatchNorm]) -> functools.partial[Block]:
        """Returns a function that makes the blocks of a stage."""
        n, block = self.width * 2 ** (stage - 1), BLOCKS[self.block]
        outputs = n * block.expansion
        n = max(1, n * self.width_per_group // 64) * self.groups
        common = {"dtype": self.dtype, "initial": self.initial, "ops": self.ops}
        cell = None
        if self.regulator is not None and self._regulates(stage):
            cell = functools.partial(
                CELLS[self.regulator],
                features=outputs if issubclass(block, DIABlock) else n,
                kernel=self.kernel,
                grouping=self.regulator_grouping,
                **common,
            )
        return functools.partial(
            block,
            features=n,
            outputs=outputs,
            groups=self.groups,
            norm=norm,
            cell=cell,
            normalize_state=self.normalize_state,
            replace=self.replace,
            squeeze_excite=self.squeeze_excite,
            shortcut=self.shortcut,
            stride_at=self.bottleneck_stride,
            fuse_init=self.fuse_init,
            **common,
        )


def unstack_blocks(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Unstacks the blocks that `nn.scan` stacked (`blocks`) into individual ones (`block2`, `block3`, …).

    Args:
      tree: variables, or one collection of them, or gradients: nested dicts of arrays.

    Returns:
      The tree for the model with scan=False.
    """
    out: dict[str, Any] = {}
    for name, value in tree.items():
        if name == "blocks":
            length = jax.tree.leaves(value)[0].shape[0]
            for index in range(length):
                out[f"block{index + 2}"] = jax.tree.map(lambda a, i=index: a[i], dict(value))
        else:
            out[name] = unstack_blocks(value) if isinstance(value, Mapping) else value
    return out


def stack_blocks(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Inverts `unstack_blocks`: returns the tree for the model with scan=True."""
    out: dict[str, Any] = {}
    repeated = sorted((n for n in tree if n.startswith("block") and n[5:].isdigit() and n != "block1"), key=_index)
    for name, value in tree.items():
        if name not in repeated:
            out[name] = stack_blocks(value) if isinstance(value, Mapping) else value
    if repeated:
        out["blocks"] = jax.tree.map(lambda *arrays: jnp.stack(arrays), *(dict(tree[name]) for name in repeated))
    return out


def _index(name: str) -> int:
    return int(name.removeprefix("block"))
