"""RegNet, self-regulated networks for image classification (arXiv 2101.00590), in JAX and Flax linen."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# First, to handle a Ctrl-C during the other imports, and to restart before them.
from regnet_flax import start  # noqa: F401

if TYPE_CHECKING:
    from regnet_flax.models.plugins import register_regulator
    from regnet_flax.models.registry import create_model, list_models
    from regnet_flax.port.shipped import list_weights
    from regnet_flax.trained import Trained

__version__ = "0.2.0.dev0"
__all__ = ["__version__", "create_model", "list_models", "list_weights", "load", "register_regulator"]

# Imported on first use, so that the command line answers before JAX is imported.
_LAZY = {
    "create_model": "regnet_flax.models.registry",
    "list_models": "regnet_flax.models.registry",
    "list_weights": "regnet_flax.port.shipped",
    "register_regulator": "regnet_flax.models.plugins",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def load(workdir: str | os.PathLike[str], checkpoint: str | int = "best", *, seed: int | None = None) -> Trained:
    """Loads the model that a run trained.

        trained = regnet_flax.load("runs/digits-regnet20_convlstm-0")
        probabilities = trained.predict("photo.jpg")  # float32 (1, classes)
        trained.class_names[probabilities[0].argmax()]

    Args:
      workdir: the run's directory. Its config.json names the modules of `model.plugins`, which are imported.
        Or a file of weights that `--mode export` wrote, which has one checkpoint of one seed; or the name of weights
        that come with the package, one of `list_weights()`.
      checkpoint: "best", "last" or a step.
      seed: one of several seeds that trained together; the first by default.

    Returns:
      The model with its variables, config and class names; see `trained.Trained`.

    Raises:
      WorkdirError: the workdir does not exist, or holds no checkpoint.
      ConfigError: the run has no such seed, or another value of config.json is wrong.
      CheckpointError: no checkpoint can be read.
      WeightsError: the file cannot be read, or does not say what it is of.
    """
    from regnet_flax import trained  # imports everything that training needs

    return trained.load(workdir, checkpoint, seed=seed)
