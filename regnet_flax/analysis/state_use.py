"""How much a trained RegNet uses its regulators' state H, stage by stage, without retraining."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from regnet_flax.models.regnet import unstack_blocks

BATCH = 256


@dataclasses.dataclass(frozen=True)
class StageUse:
    """How one stage uses its regulator's state.

    Attributes:
      stage: from 1.
      norms: maps "1.1" and so on, stage and block, to the Frobenius norms of both halves of the 1×1 convolution that
        fuses [X, H]: first X's half, then H's.
      logits_change: ‖logits with H − logits without‖ / ‖logits with H‖ over all images, when H is zero in this stage's
        fusions.
      predictions_change: the share of the images whose predicted class then changes.
      accuracy: with H, and without; None without labels.
    """

    stage: int
    norms: dict[str, tuple[float, float]]
    logits_change: float
    predictions_change: float
    accuracy: tuple[float, float] | None


def state_use(model: nn.Module, variables: dict[str, Any], images: Any, labels: Any = None) -> list[StageUse]:
    """Measures the use of each stage's regulator.

    A block sees H only through the 1×1 convolution of [X, H], so zeroing the kernel's weights for H removes H from the
    block. The recurrence itself continues.

    Args:
      model: a RegNet that fuses X with H, from create_model.
      variables: "params" and "batch_stats".
      images: normalised, (N, height, width, channels).
      labels: (N,), for the accuracy.

    Returns:
      One entry per stage that has a regulator.

    Raises:
      ValueError: no stage has a regulator, or H replaces X.
    """
    flat: dict[Any, Any] = traverse_util.flatten_dict(dict(variables))
    fusing = [path for path in flat if "conv_fuse" in path]
    stages = sorted({int(path[1].removeprefix("stage")) for path in fusing})
    if not stages:
        raise ValueError(f"no block of this {type(model).__name__} fuses its features with a regulator's state")
    logits = _logits(model, variables, images)
    found = []
    for stage in stages:
        own = [path for path in fusing if path[1] == f"stage{stage}"]
        without = traverse_util.unflatten_dict(flat | {path: _without_h(flat[path]) for path in own})
        changed = _logits(model, without, images)
        accuracy = None
        if labels is not None:
            before, after = (float((a.argmax(-1) == np.asarray(labels)).mean()) for a in (logits, changed))
            accuracy = before, after
        found.append(
            StageUse(
                stage,
                dict(_norms(variables["params"][f"stage{stage}"], stage)),
                float(np.linalg.norm(changed - logits) / np.linalg.norm(logits)),
                float((changed.argmax(-1) != logits.argmax(-1)).mean()),
                accuracy,
            )
        )
    return found


def _without_h(kernel: Any) -> jax.Array:
    """Returns a fusing kernel (…, 2n, n), of one or several blocks, with zeros for H."""
    n = kernel.shape[-1]
    return jnp.asarray(kernel).at[..., n:, :].set(0)


def _norms(stage: dict[str, Any], number: int) -> Iterator[tuple[str, tuple[float, float]]]:
    blocks = unstack_blocks(stage)
    for name in sorted((name for name in blocks if name.startswith("block")), key=lambda name: int(name[5:])):
        kernel = np.asarray(blocks[name]["conv_fuse"]["kernel"], np.float64)
        n = kernel.shape[-1]
        halves = (kernel[..., :n, :], kernel[..., n:, :])
        yield f"{number}.{name[5:]}", tuple(float(np.sqrt((half**2).sum())) for half in halves)  # pyright: ignore


@functools.partial(jax.jit, static_argnames="model")
def _apply(model: nn.Module, variables: dict[str, Any], images: jax.Array) -> Any:
    return model.apply(variables, images, train=False)


def _logits(model: nn.Module, variables: dict[str, Any], images: Any) -> np.ndarray:
    """Returns the logits, float32 (N, classes)."""
    parts = [_apply(model, variables, images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
    return np.concatenate([np.asarray(part, np.float32) for part in parts])
