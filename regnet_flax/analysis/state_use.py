"""How much a trained RegNet uses its regulators' state H, stage by stage, without training it again."""

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
    """What one stage makes of its regulator's state.

    Attributes:
      stage: from 1.
      norms: from "1.1" and so on, stage and block, to the Frobenius norms of both halves of the 1×1 convolution that
        fuses [X, H]: that of X, and that of H.
      logits_change: ‖logits with H − logits without‖ / ‖logits with H‖ where H is zero in this stage's fusions, over
        all images.
      predictions_change: the share of the images whose class changes then.
      accuracy: with H, and without; None where no labels are given.
    """

    stage: int
    norms: dict[str, tuple[float, float]]
    logits_change: float
    predictions_change: float
    accuracy: tuple[float, float] | None


def state_use(model: nn.Module, variables: dict[str, Any], images: Any, labels: Any = None) -> list[StageUse]:
    """The use of each stage's regulator, which is switched off as `without_state` does.

    Args:
      model: a RegNet that fuses X with H, from create_model.
      variables: "params" and "batch_stats".
      images: normalised, (N, height, width, channels).
      labels: (N,), for the accuracy.

    Returns:
      The stages that have a regulator.

    Raises:
      ValueError: none has, or H takes the place of X.
    """
    stages = fusing_stages(variables)
    if not stages:
        raise ValueError(f"no block of this {type(model).__name__} fuses its features with a regulator's state")
    logits = _logits(model, variables, images)
    found = []
    for stage in stages:
        changed = _logits(model, without_state(variables, stage), images)
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


def fusing_stages(variables: dict[str, Any]) -> list[int]:
    """The stages, from 1, whose blocks fuse their features with a regulator's state."""
    flat: dict[Any, Any] = traverse_util.flatten_dict(dict(variables))
    return sorted({int(path[1].removeprefix("stage")) for path in flat if "conv_fuse" in path})


def without_state(variables: dict[str, Any], *stages: int) -> dict[str, Any]:
    """Variables of the same network with these stages' regulators switched off: their blocks see zeros for H.

    A block sees H through the 1×1 convolution of [X, H] alone, so those of that kernel's weights that H meets become
    zero. The state itself runs on.
    """
    flat: dict[Any, Any] = traverse_util.flatten_dict(dict(variables))
    names = [f"stage{stage}" for stage in stages]
    changed = {path: _without_h(flat[path]) for path in flat if "conv_fuse" in path and path[1] in names}
    return traverse_util.unflatten_dict(flat | changed)


def _without_h(kernel: Any) -> jax.Array:
    """A fusing kernel (…, 2n, n), of one block or of several, with zeros where H comes in."""
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
    """float32 (N, classes)."""
    parts = [_apply(model, variables, images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
    return np.concatenate([np.asarray(part, np.float32) for part in parts])
