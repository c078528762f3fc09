"""Grad-CAM: which places of a block's output speak for a class (Selvaraju et al., arXiv 1610.02391)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from regnet_flax.analysis.features import inspect
from regnet_flax.models import regnety
from regnet_flax.models.blocks import Block
from regnet_flax.models.regnet import unstack_blocks


def grad_cam(
    model: nn.Module, variables: dict[str, Any], images: Any, *, block: str = "", classes: Any = None
) -> np.ndarray:
    """ReLU(Σ_k α_k A^k), A the block's output and α_k the mean over places of the class's logit's gradient by A^k.

    Args:
      model: from create_model, any of them, with classes.
      variables: "params" and "batch_stats".
      images: normalised, (N, height, width, channels).
      block: such as "3.2", the second block of the third stage; "" is the last.
      classes: (N,), whose logit is asked about; None is the model's own choice for each image.

    Returns:
      float32 (N, height, width) of the block's output, from 0.

    Raises:
      ValueError: there is no such block.
    """
    blocks = {found.name: found for found in inspect(model, variables, images)}
    name = block or list(blocks)[-1]
    if name not in blocks:
        raise ValueError(f"there is no block {block!r}: name one of {', '.join(blocks)}")
    stage, number = name.split(".")
    paths = ((f"stage{stage}", f"block{number}"), (f"stage{stage}_block{number}",))
    if hasattr(model, "scan"):  # a block by its own name
        model, variables = model.clone(scan=False), unstack_blocks(variables)

    def scores(change: jax.Array, classes: Any) -> jax.Array:
        def add(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            found = call(*args, **kwargs)
            module = context.module
            if context.method_name != "__call__" or module.path not in paths:
                return found
            assert isinstance(module, (Block, regnety.Block))
            (first, *rest), tree = jax.tree.flatten(found)  # X comes first
            return jax.tree.unflatten(tree, [first + change.astype(first.dtype), *rest])

        with nn.intercept_methods(add):
            logits: Any = model.apply(variables, images, train=False)
        classes = logits.argmax(-1) if classes is None else jnp.asarray(classes)
        return jnp.take_along_axis(logits, classes[:, None], 1).sum()

    output = blocks[name].output
    gradient = jax.jit(jax.grad(scores))(jnp.zeros(output.shape), classes)
    weights = np.asarray(gradient).mean((1, 2), keepdims=True)
    return np.maximum((weights * output).sum(-1), 0)
