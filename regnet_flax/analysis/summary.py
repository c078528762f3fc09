"""What a model costs: parameters, multiply-adds, and the output shape of each stage."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from regnet_flax.models.regulators import Regulator


def count_parameters(params: Any) -> int:
    """The number of weights in a tree of arrays; running statistics are not among a model's `params`."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


@dataclasses.dataclass
class Part:
    """One part of a model, such as a stage.

    Attributes:
      name: its name among the variables.
      parameters: how many.
      multiply_adds: of convolutions, dense layers and regulators for one image; those of batch normalisation,
        activations and pooling are not counted, as is usual in the field.
      output: shape of its output for one image, None if it has several.
    """

    name: str
    parameters: int = 0
    multiply_adds: int = 0
    output: tuple[int, ...] | None = None


def _multiply_adds(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> int:
    if isinstance(module, nn.Conv):
        taps = int(np.prod(module.kernel_size, dtype=int)) * inputs[0].shape[-1] // module.feature_group_count
        return math.prod(output.shape[1:]) * taps
    if isinstance(module, nn.Dense):
        return math.prod(output.shape[1:]) * inputs[0].shape[-1]
    if isinstance(module, Regulator):
        return math.prod(inputs[0].shape[1:3]) * module.multiply_adds
    return 0


def summarize(model: nn.Module, image_shape: tuple[int, int, int]) -> list[Part]:
    """The parts of a model, in the order in which they run.

    Nothing is computed: shapes are traced, and the stages' blocks one by one, since XLA's own count takes the body of a
    loop once.

    Args:
      model: from create_model.
      image_shape: (height, width, channels).
    """
    if hasattr(model, "scan"):
        model = model.clone(scan=False)
    parts: dict[str, Part] = {}
    inside = [""]  # a shared regulator runs detached from the model, so its own path does not tell where it is

    def count(call, args, kwargs, context):
        module = context.module
        if context.method_name != "__call__" or module.is_initializing():  # apply asks for the shapes of parameters
            return call(*args, **kwargs)
        of_the_model = isinstance(module.parent, type(model))
        if of_the_model:
            inside[0] = module.path[0]
        output = call(*args, **kwargs)
        if inside[0]:
            part = parts.setdefault(inside[0], Part(inside[0]))
            part.multiply_adds += _multiply_adds(module, args, output)
            if of_the_model:
                part.output = output.shape[1:] if hasattr(output, "shape") else None
        return output

    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(lambda key, x: model.init(key, x, train=False), jax.random.key(0), images)
    with nn.intercept_methods(count):
        jax.eval_shape(lambda variables, x: model.apply(variables, x, train=False), variables, images)
    for name, tree in variables["params"].items():
        parts.setdefault(name, Part(name)).parameters = count_parameters(tree)
    return list(parts.values())


def table(parts: list[Part], title: str) -> Table:
    """`summarize`'s parts and their total, for the terminal."""
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
