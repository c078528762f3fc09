"""The size of a model: parameters, multiply-adds, and the output shape of each stage."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from regnet_flax.models.blocks import Block
from regnet_flax.models.families.rlanet import RLANet
from regnet_flax.models.layers import BatchNorm, Conv
from regnet_flax.models.regnet import RegNet
from regnet_flax.models.regulators import Regulator


def count_parameters(params: Any) -> int:
    """Returns the number of weights in a tree of arrays; a model's `params` do not include running statistics."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


@dataclasses.dataclass
class Part:
    """One part of a model, such as a stage.

    Attributes:
      name: its name in the variables.
      parameters: the number of parameters.
      multiply_adds: of convolutions, dense layers and regulators for one image; by the field's convention, batch
        normalisation, activations and pooling do not count.
      output: shape of its output for one image, None if it has several.
    """

    name: str
    parameters: int = 0
    multiply_adds: int = 0
    output: tuple[int, ...] | None = None


def _inside_regulator(module: nn.Module) -> bool:
    parent = module.parent
    while isinstance(parent, nn.Module):
        if isinstance(parent, Regulator):
            return True
        parent = parent.parent
    return False


def _multiply_adds(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> int:
    if _inside_regulator(module):  # the regulator itself counts its inner layers
        return 0
    if isinstance(module, (nn.Conv, Conv)):
        taps = int(np.prod(module.kernel_size, dtype=int)) * inputs[0].shape[-1] // module.feature_group_count
        return math.prod(output.shape[1:]) * taps
    if isinstance(module, nn.Dense):
        return math.prod(output.shape[1:]) * inputs[0].shape[-1]
    if isinstance(module, Regulator):
        return math.prod(inputs[0].shape[1:-1]) * module.multiply_adds
    return 0


@functools.lru_cache(maxsize=64)  # networks that differ only in depth are traced once
def _trace(model: nn.Module, image_shape: tuple[int, int, int]) -> dict[tuple[str, str], Part]:
    """Returns the model's parts by (module, the module's block or ""); only the parts with "" have a shape."""
    found: dict[tuple[str, str], Part] = {}
    inside = ["", ""]  # a shared regulator runs detached from the model, so its path does not show where it is

    def count(call, args, kwargs, context):
        module = context.module
        # Before its blocks, a stage runs a shared regulator only to create its parameters and to check it.
        before_blocks = isinstance(module, Regulator) and not inside[1]
        # The layers that hand values to each other compute in `value`, which their `__call__` calls.
        if context.method_name != ("value" if isinstance(module, (Conv, BatchNorm)) else "__call__") or before_blocks:
            return call(*args, **kwargs)
        of_the_model = isinstance(module.parent, type(model))
        if of_the_model:
            inside[:] = module.path[0], ""
        elif isinstance(module, Block):
            inside[1] = module.path[1]
        output = call(*args, **kwargs)
        if inside[0]:
            found.setdefault((inside[0], inside[1]), Part(inside[0])).multiply_adds += _multiply_adds(
                module, args, output
            )
        if of_the_model and hasattr(output, "shape"):
            found.setdefault((module.path[0], ""), Part(module.path[0])).output = output.shape[1:]
        return output

    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    with nn.intercept_methods(count):
        variables = jax.eval_shape(lambda key, x: model.init(key, x, train=False), jax.random.key(0), images)
    for name, tree in variables["params"].items():
        blocks = {key: value for key, value in tree.items() if key.startswith("block")}
        rest = {key: value for key, value in tree.items() if key not in blocks}
        for block, part in (("", rest), *blocks.items()):
            found.setdefault((name, block), Part(name)).parameters = count_parameters(part)
    return found


def summarize(model: nn.Module, image_shape: tuple[int, int, int]) -> list[Part]:
    """Returns the parts of a model, in the order in which they run.

    It traces shapes and computes nothing. A stage's blocks after the first are alike, so it traces one of them and
    counts it as often as it occurs. (XLA's own count takes the body of a loop once.)

    Args:
      model: from create_model.
      image_shape: (height, width, channels).
    """
    lengths: dict[str, int] = {}
    if isinstance(model, (RegNet, RLANet)):
        lengths = {f"stage{stage}": length for stage, length in enumerate(model.stage_sizes, start=1)}
        alone: dict[str, Any] = {"scan": False} if isinstance(model, RegNet) else {}
        model = model.clone(stage_sizes=tuple(min(2, length) for length in model.stage_sizes), **alone)
    parts: dict[str, Part] = {}
    for (name, block), part in _trace(model, image_shape).items():
        times = lengths[name] - 1 if block == "block2" else 1
        total = parts.setdefault(name, Part(name))
        total.parameters += times * part.parameters
        total.multiply_adds += times * part.multiply_adds
        total.output = total.output or part.output
    return list(parts.values())


def table(parts: list[Part], title: str) -> Table:
    """Makes a table of `summarize`'s parts and their total, for the terminal."""
    out = Table(title=title, title_justify="left")
    for column in ("part", "output", "parameters", "multiply-adds"):
        out.add_column(column, justify="left" if column == "part" else "right")
    for part in parts:
        shape = "×".join(map(str, part.output)) if part.output else ""
        out.add_row(part.name, shape, f"{part.parameters:,}", f"{part.multiply_adds:,}")
    out.add_section()
    totals = sum(part.parameters for part in parts), sum(part.multiply_adds for part in parts)
    out.add_row("total", "", *(f"{total:,}" for total in totals))
    return out
