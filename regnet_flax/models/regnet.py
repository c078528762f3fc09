"""ResNet and RegNet: stem, stages of blocks under `nn.scan`, head (arXiv 2101.00590 and arXiv 1512.03385)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from regnet_flax.models import convolution
from regnet_flax.models.blocks import BasicBlock, Block, BottleneckBlock
from regnet_flax.models.convolution import Remade, array
from regnet_flax.models.initializers import INITIALIZERS
from regnet_flax.models.normalization import BatchNorm
from regnet_flax.models.regulators import REGULATORS, ReplacingConvGRU, check_cell

Array = jax.Array

# The paper's, and a public project's.
CELLS = REGULATORS | {"replacing_convgru": ReplacingConvGRU}
BLOCKS: dict[str, type[Block]] = {"basic": BasicBlock, "bottleneck": BottleneckBlock}


class Stage(nn.Module):
    """A run of blocks of one spatial size, with one regulator running through them.

    The first block, which may change stride and width, stands alone (`block1`); the others are alike and run under
    `nn.scan`, their variables stacked on a leading axis (`blocks`), or in a Python loop (`block2`, `block3`, …).

    Attributes:
      block: makes a block, given `name` and, for the first, `strides`.
      length: how many blocks.
      strides: of the first.
      shared: whether one regulator (`regulator`) serves all blocks, or each has its own.
      scan, unroll, remat: see RegNet.
    """

    block: functools.partial[Block]
    length: int
    strides: int
    shared: bool
    scan: bool
    unroll: int
    remat: bool

    @nn.compact
    def __call__(self, x: Array | Remade) -> Array:
        """From (N, height, width, channels) to (N, ⌈height/strides⌉, ⌈width/strides⌉, the block's channels)."""
        block_type, options = self.block.func, self.block.keywords
        carry, shared = (x, ()), None
        if options["cell"] is not None:
            cell = options["cell"](parent=None)
            n, height, width, _ = array(x).shape
            shape = (n, -(-height // self.strides), -(-width // self.strides), options["features"])
            state = cell.initial_state(shape, options["dtype"])
            carry = (x, state)
            if self.is_initializing():
                check_cell(cell, state, shared=self.shared)
            if self.shared:
                # Made here and passed to every block: a cell handed over as a submodule of the scanned block would
                # silently be given one copy per step.
                shared = self.param("regulator", lambda key: cell.init(key, state[0], state).get("params", {}))

        alone = nn.remat(block_type) if self.remat else block_type
        carry, _ = alone(**options, strides=self.strides, name="block1")(carry, shared)
        if not self.scan:
            for index in range(2, self.length + 1):
                carry, _ = alone(**options, name=f"block{index}")(carry, shared)
        elif self.length > 1:
            # A loop keeps XLA from merging the recomputation with the first computation, so nothing else need.
            rolled = self.unroll < self.length - 1
            repeated = nn.remat(block_type, prevent_cse=not rolled) if self.remat else block_type
            blocks = nn.scan(
                repeated,
                variable_axes={"params": 0, "batch_stats": 0, "intermediates": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
                length=self.length - 1,
                unroll=min(self.unroll, self.length - 1),
            )
            carry, _ = blocks(**options, name="blocks")(carry, shared)
        return carry[0]


class RegNet(nn.Module):
    """A ResNet whose stages may each have a regulator beside their blocks.

    Attributes:
      stage_sizes: the number of blocks of each stage.
      num_classes: 0 gives the pooled features.
      block: "basic" or "bottleneck".
      stem: "cifar", a 3×3 convolution; "cifar_pool", that and a 3×3 max-pool at stride 2; or "imagenet", 7×7 at stride
        2 and that max-pool.
      width: channels of the stem and n of the first stage; n doubles from stage to stage.
      regulator: a key of CELLS; None is plain ResNet, and the next five have no effect then.
      kernel: of the regulators, "separable" or "dense"; "pallas", the separable ConvLSTM as kernels for a GPU.
      share_regulator: one regulator for all blocks of a stage, or one each; the state is passed on in both.
      regulated_stages: the stages, from 1, that have a regulator; None is all.
      normalize_state, replace: see Block.
      squeeze_excite: whether each block ends in squeeze-and-excitation.
      shortcut: "B", a 1×1 convolution where the shape changes, or "A", without parameters.
      bottleneck_stride: the convolution of a bottleneck that carries the stride, "1x1" (He et al. 2015) or, without
        regulators only, "3x3" (torchvision).
      initial: initial values, "paper" or "torch".
      scan: run a stage's blocks under `nn.scan`; False is a Python loop over blocks named one by one.
      unroll: blocks a step of the scan. None takes all on a CPU, where a loop is somewhat slower, and
        1 elsewhere.
      remat: recompute each block in the backward pass instead of keeping what is in it.
      tuned: use the forms of `convolution` and `normalization` that are fast on a CPU. None does on a CPU.
      dtype: of the arithmetic; parameters and batch statistics are float32.
      axis_name: the pmap axis over which batch statistics are taken; None is this device's batch.
      features: return the stages' outputs instead of logits.
    """

    stage_sizes: tuple[int, ...]
    num_classes: int = 10
    block: str = "basic"
    stem: str = "cifar"
    width: int = 16
    regulator: str | None = None
    kernel: str = "separable"
    share_regulator: bool = True
    regulated_stages: tuple[int, ...] | None = None
    normalize_state: bool = True
    replace: bool = False
    squeeze_excite: bool = False
    shortcut: str = "B"
    bottleneck_stride: str = "1x1"
    initial: str = "paper"
    scan: bool = True
    unroll: int | None = None
    remat: bool = False
    tuned: bool | None = None
    dtype: Any = jnp.float32
    axis_name: str | None = None
    features: bool = False

    def _regulates(self, stage: int) -> bool:
        return self.regulated_stages is None or stage in self.regulated_stages

    @nn.compact
    def __call__(self, images: Array, train: bool = False, features: bool | None = None) -> Any:
        """Classifies images.

        Args:
          images: (N, height, width, channels), normalised.
          train: take batch statistics from this batch, and update the running ones.
          features: overrides the attribute.

        Returns:
          Logits (N, num_classes); the pooled features (N, channels) where num_classes is 0; or, with `features`, a
          dict from "stage1", "stage2", … to (N, height, width, channels). Logits and pooled features are float32.
        """
        init, wide = INITIALIZERS[self.initial], jnp.promote_types(self.dtype, jnp.float32)
        on_cpu = jax.default_backend() == "cpu"
        tuned = on_cpu if self.tuned is None else self.tuned
        norm = functools.partial(
            BatchNorm, use_running_average=not train, dtype=self.dtype, axis_name=self.axis_name, tuned=tuned
        )
        size, strides = ((7, 7), 2) if self.stem == "imagenet" else ((3, 3), 1)
        pad = (size[0] // 2, size[0] // 2)
        x = nn.Conv(
            self.width,
            size,
            strides,
            (pad, pad),
            use_bias=False,
            dtype=self.dtype,
            kernel_init=init.conv,
            conv_general_dilated=convolution.conv_general_dilated if tuned else None,
            name="conv1",
        )(images.astype(self.dtype))
        x = norm(name="bn1", relu=True).remade(x)
        if self.stem != "cifar":
            x = nn.max_pool(array(x), (3, 3), (2, 2), ((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]

        unroll = self.unroll or (max(self.stage_sizes) if on_cpu else 1)
        outputs = {}
        for stage, length in enumerate(self.stage_sizes, start=1):
            n = self.width * 2 ** (stage - 1)
            cell = None
            if self.regulator is not None and self._regulates(stage):
                cell = functools.partial(
                    CELLS[self.regulator],
                    features=n,
                    kernel=self.kernel,
                    dtype=self.dtype,
                    initial=self.initial,
                    tuned=tuned,
                )
            block = functools.partial(
                BLOCKS[self.block],
                features=n,
                norm=norm,
                cell=cell,
                normalize_state=self.normalize_state,
                replace=self.replace,
                squeeze_excite=self.squeeze_excite,
                shortcut=self.shortcut,
                stride_at=self.bottleneck_stride,
                dtype=self.dtype,
                initial=self.initial,
                tuned=tuned,
            )
            x = Stage(
                block=block,
                length=length,
                strides=1 if stage == 1 else 2,
                shared=self.share_regulator,
                scan=self.scan,
                unroll=unroll,
                remat=self.remat,
                name=f"stage{stage}",
            )(x)
            outputs[f"stage{stage}"] = x
        if self.features if features is None else features:
            return outputs
        pooled = array(x).mean((1, 2), dtype=wide)
        if not self.num_classes:
            return pooled
        return nn.Dense(
            self.num_classes,
            dtype=wide,
            kernel_init=init.dense,
            bias_init=init.bias(pooled.shape[-1]),
            name="head",
        )(pooled)


def unstack_blocks(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Names a stage's blocks one by one (`block2`, `block3`, …) where `nn.scan` stacked them (`blocks`).

    Args:
      tree: variables, or one collection of them, or gradients: nested dicts of arrays.

    Returns:
      What the model takes with scan=False.
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
    """The inverse of `unstack_blocks`: what the model takes with scan=True."""
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
