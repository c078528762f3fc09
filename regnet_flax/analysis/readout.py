"""The last layer applied to earlier blocks: figure 1(b) of the paper (Xu et al., arXiv 2101.00590)."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from regnet_flax.analysis.features import sown_blocks
from regnet_flax.models.ops.plain import normalize

BATCH = 256


def readouts(model: nn.Module, variables: dict[str, Any], images: Any, labels: Any) -> dict[str, float]:
    """Measures the accuracy of the trained last layer on the pooled output of each block that fits it.

    Nothing is retrained. The blocks are those of the last stage, whose outputs have as many channels as the last layer
    has inputs. For a pre-activation network, its last batch normalisation and ReLU precede the pooling.

    Args:
      model: from create_model, with classes.
      variables: "params" and "batch_stats".
      images: normalised, (N, height, width, channels).
      labels: (N,).

    Returns:
      Maps "3.1" and so on, stage and block, to the share of correctly classified images. The last one is the network's
      own accuracy.

    Raises:
      ValueError: the model has no last layer, or one that needs more than a block's output, as in RLA-Net.
    """
    right: dict[str, int] = {}
    for start in range(0, len(images), BATCH):
        predicted = _predictions(model, variables, images[start : start + BATCH])
        if not predicted:
            raise ValueError(f"the last layer of {type(model).__name__} does not take the pooled output of a block")
        for name, classes in predicted.items():
            right[name] = right.get(name, 0) + int((np.asarray(classes) == labels[start : start + BATCH]).sum())
    return {name: count / len(images) for name, count in right.items()}


@functools.partial(jax.jit, static_argnames="model")
def _predictions(model: nn.Module, variables: dict[str, Any], images: jax.Array) -> dict[str, jax.Array]:
    """Predicts the class of each image from each block's output."""
    params = variables["params"]
    if "head" not in params:
        return {}
    _, updates = model.apply(variables, images, train=False, mutable=["intermediates"])
    kernel, found = params["head"]["kernel"], {}
    for (stage, block), sown in sown_blocks(updates["intermediates"]).items():
        x = sown["output"][0]
        if x.shape[-1] != kernel.shape[0]:
            continue
        if "bn_last" in params:
            norm, running = params["bn_last"], variables["batch_stats"]["bn_last"]
            x = normalize(x, running["mean"], running["var"], norm["scale"], norm["bias"], relu=True)
        pooled = x.mean((1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
        found[f"{stage}.{block}"] = (pooled @ kernel + params["head"]["bias"]).argmax(-1)
    return found
