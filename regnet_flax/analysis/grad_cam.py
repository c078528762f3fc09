"""Grad-CAM: the positions in a block's output that support a class (Selvaraju et al., arXiv 1610.02391)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from regnet_flax.analysis.features import sown_blocks
from regnet_flax.models.ops import PLAIN
from regnet_flax.models.regnet import unstack_blocks


def grad_cam(
    model: nn.Module, variables: dict[str, Any], images: Any, *, blocks: Sequence[str] = (), classes: Any = None
) -> dict[str, np.ndarray]:
    """Computes ReLU(Σ_k α_k A^k): A is a block's output, α_k the spatial mean of ∂(class logit)/∂A^k.

    Args:
      model: any model from create_model that has classes.
      variables: "params" and "batch_stats".
      images: normalised, (N, height, width, channels).
      blocks: names such as "3.2", the second block of the third stage; () means the last block.
      classes: (N,), the class to explain for each image; None means the model's prediction.

    Returns:
      Maps a block's name to float32 (N, height, width), with its output's height and width; no value is negative.

    Raises:
      ValueError: a block does not exist.
    """
    shapes = jax.eval_shape(functools.partial(_outputs, model), variables, images)
    known = sorted(shapes, key=lambda name: [int(number) for number in name.split(".")])
    names = list(blocks) or known[-1:]
    if wrong := [name for name in names if name not in known]:
        raise ValueError(f"there is no block {wrong[0]!r}: name one of {', '.join(known)}")
    paths = {}
    for name in names:
        stage, number = name.split(".")
        paths |= {(f"stage{stage}", f"block{number}"): name, (f"stage{stage}_block{number}",): name}
    model = model.clone(ops=PLAIN)
    if hasattr(model, "scan"):  # gives each block its own name
        model, variables = model.clone(scan=False), unstack_blocks(variables)

    def scores(changes: dict[str, jax.Array], variables: Any, classes: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        outputs = {}

        def add(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            found = call(*args, **kwargs)
            path = context.module.path
            if context.method_name != "__call__" or path not in paths:
                return found
            (x, *rest), tree = jax.tree.flatten(found)  # X comes first
            outputs[paths[path]] = x
            return jax.tree.unflatten(tree, [x + changes[paths[path]].astype(x.dtype), *rest])

        with nn.intercept_methods(add):
            logits: Any = model.apply(variables, images, train=False)
        classes = logits.argmax(-1) if classes is None else jnp.asarray(classes)
        return jnp.take_along_axis(logits, classes[:, None], 1).sum(), outputs

    unchanged = {name: jnp.zeros(shapes[name].shape) for name in names}
    gradients, outputs = jax.jit(jax.grad(scores, has_aux=True))(unchanged, variables, classes)
    maps = {}
    for name in names:
        weights = np.asarray(gradients[name]).mean((1, 2), keepdims=True)
        maps[name] = np.maximum((weights * np.asarray(outputs[name], np.float32)).sum(-1), 0)
    return maps


def _outputs(model: nn.Module, variables: dict[str, Any], images: Any) -> dict[str, jax.Array]:
    """Returns the blocks' outputs by name."""
    _, updates = model.apply(variables, images, train=False, mutable=["intermediates"])
    found = sown_blocks(updates["intermediates"])
    return {f"{stage}.{block}": sown["output"][0] for (stage, block), sown in found.items()}
