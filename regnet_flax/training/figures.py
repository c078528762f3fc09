"""What a model makes of a test split: pictures, and precision and recall of each class."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from regnet_flax.analysis import plots
from regnet_flax.data.sources import Dataset
from regnet_flax.training.evaluate import confusion_matrix, per_class

EXAMPLES = 16


def write_figures(
    directory: pathlib.Path, dataset: Dataset, outcomes: np.ndarray, title: str, seed: int
) -> list[dict[str, Any]]:
    """Writes predictions.png, of 16 test images chosen at random, and confusion.png, of all of them.

    Args:
      directory: made where it is not.
      dataset: whose test split it is.
      outcomes: int (N, 2), label and predicted class of each test image; −1 for one that there is not.
      title: above the pictures; the accuracy is added.
      seed: fixes which images are shown.

    Returns:
      See evaluate.per_class.
    """
    directory.mkdir(parents=True, exist_ok=True)
    names = dataset.class_names
    confusion = confusion_matrix(outcomes, len(names))
    right, count = int(np.trace(confusion)), int(confusion.sum())
    title = f"{title}\n{right:,} of {count:,} test images right ({right / count:.2%})"
    there = np.flatnonzero(outcomes[:, 0] >= 0)
    chosen = np.random.default_rng(seed).choice(there, min(EXAMPLES, len(there)), replace=False)
    labels, predicted = outcomes[chosen].T
    plots.predictions(dataset.test.images[chosen], labels, predicted, names, directory / "predictions.png", title)
    plots.confusion(confusion, names, directory / "confusion.png", title)
    return per_class(confusion, names)
