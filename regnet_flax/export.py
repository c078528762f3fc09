"""--mode export: a trained model's weights in a file, by PyTorch's names."""

from __future__ import annotations

import logging
import pathlib
from typing import Any

import flax.linen as nn

from regnet_flax.torch_port import to_torch
from regnet_flax.weights import write_weights

SUFFIX = {"safetensors": ".safetensors", "torch": ".pth"}

logger = logging.getLogger("regnet_flax")


def export_weights(
    config: Any, model: nn.Module, variables: dict[str, Any], step: int, workdir: str | pathlib.Path
) -> pathlib.Path:
    """Writes the file that `export.path` and `export.format` ask for.

    Args:
      config: the workdir's.
      model: from create_model.
      variables: "params" and "batch_stats".
      step: of the checkpoint that they are of.
      workdir: where the file goes if `export.path` is "".

    Returns:
      The file.

    Raises:
      WeightsError: the path's suffix is none of a file of weights, or PyTorch is needed and not installed.
    """
    suffix = SUFFIX[config.export.format]
    path = pathlib.Path(config.export.path) if config.export.path else pathlib.Path(workdir) / f"weights{suffix}"
    arrays = to_torch(variables, model)
    metadata = {
        "model": config.model.name,
        "num_classes": str(config.dataset.num_classes),
        "dataset": config.dataset.name,
        "step": str(step),
    }
    if getattr(model, "block", "") == "bottleneck":
        metadata["bottleneck_stride"] = getattr(model, "bottleneck_stride", "")
    write_weights(path, arrays, metadata)
    logger.info("%s: %d arrays of %s at step %d", path, len(arrays), config.model.name, step)
    return path
