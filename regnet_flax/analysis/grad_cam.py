"""Grad-CAM: which places of a block's output speak for a class (Selvaraju et al., arXiv 1610.02391)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from regnet_flax.analysis.features import inspect
from regnet_flax.models.ops import PLAIN
from regnet_flax.models.regnet import unstack_blocks


def grad_cam(
    model: nn.Module, variables: dict[str, Any], images: Any, *, blocks: Sequence[str] = (), classes: Any = None
) -> dict[str, np.ndarray]:
    """ReLU(Σ_k α_k A^k), A a block's output and α_k the mean over places of the class's logit's gradient by A^k.

    Args:
      model: from create_model, any of them, with classes.
      variables: "params" and "batch_stats".
      images: normalised, (N, height, width, channels).
      blocks: such as "3.2", the second block of the third stage; () is the last block.
      classes: (N,), whose logit is asked about; None is the model's own choice for each image.

    Returns:
      From a block's name to float32 (N, height, width) of its output, from 0.

    Raises:
      ValueError: there is no such block.
    """
    outputs = {found.name: found.output for found in inspect(model, variables, images)}
    names = list(blocks) or [list(outputs)[-1]]
    if wrong := [name for name in names if name not in outputs]:
        raise ValueError(f"there is no block {wrong[0]!r}: name one of {', '.join(outputs)}")
    paths = {}
    for name in names:
        stage, number = name.split(".")
        paths |= {(f"stage{stage}", f"block{number}"): name, (f"stage{stage}_block{number}",): name}
    model = model.clone(ops=PLAIN)
    if hasattr(model, "scan"):  # blocks by their own names
        model, variables = model.clone(scan=False), unstack_blocks(variables)

    def scores(changes: dict[str, jax.Array], classes: Any) -> jax.Array:
        def add(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            found = call(*args, **kwargs)
            path = context.module.path
            if context.method_name != "__call__" or path not in paths:
                return found
            (first, *rest), tree = jax.tree.flatten(found)  # X comes first
            return jax.tree.unflatten(tree, [first + changes[paths[path]].astype(first.dtype), *rest])

        with nn.intercept_methods(add):
            logits: Any = model.apply(variables, images, train=False)
        classes = logits.argmax(-1) if classes is None else jnp.asarray(classes)
        return jnp.take_along_axis(logits, classes[:, None], 1).sum()

    unchanged = {name: jnp.zeros(outputs[name].shape) for name in names}
    gradients = jax.device_get(jax.jit(jax.grad(scores))(unchanged, classes))
    weights = {name: gradient.mean((1, 2), keepdims=True) for name, gradient in gradients.items()}
    return {name: np.maximum((weights[name] * outputs[name]).sum(-1), 0) for name in names}
