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
    directory: pathlib.Path, dataset: Dataset, predicted: np.ndarray, title: str, seed: int
) -> list[dict[str, Any]]:
    """Writes predictions.png, of 16 test images chosen at random, and confusion.png, of all of them.

    Args:
      directory: made where it is not.
      dataset: whose test split was predicted.
      predicted: int (N,), the class given to each test image.
      title: above the pictures; the accuracy is added.
      seed: fixes which images are shown.

    Returns:
      See evaluate.per_class.
    """
    directory.mkdir(parents=True, exist_ok=True)
    test, names = dataset.test, dataset.class_names
    right, count = int((predicted == test.labels).sum()), len(test.labels)
    title = f"{title}\n{right:,} of {count:,} test images right ({right / count:.2%})"
    chosen = np.random.default_rng(seed).choice(count, min(EXAMPLES, count), replace=False)
    path = directory / "predictions.png"
    plots.predictions(test.images[chosen], test.labels[chosen], predicted[chosen], names, path, title)
    confusion = confusion_matrix(test.labels, predicted, len(names))
    plots.confusion(confusion, names, directory / "confusion.png", title)
    return per_class(confusion, names)
