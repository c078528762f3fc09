"""A model's predictions by class: confusion matrix, precision, recall and figures."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from regnet_flax.analysis.plots import classes
from regnet_flax.analysis.plots.fonts import readable

EXAMPLES = 16


def confusion_matrix(outcomes: np.ndarray, classes: int) -> np.ndarray:
    """Counts the examples of each class (row) that were predicted as each class (column).

    Args:
      outcomes: int (N, 2 or more), label and predicted class first; −1 where there was no example.
      classes: the number of classes.

    Returns:
      int64 (classes, classes).
    """
    labels, predicted = outcomes[outcomes[:, 0] >= 0, :2].astype(np.int64).T
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def per_class(confusion: np.ndarray, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Computes precision and recall of each class.

    Args:
      confusion: see confusion_matrix.
      class_names: the names of its rows and columns.

    Returns:
      For each class: "class", its name; "images", the number of its images; "predicted", the number of images predicted
      as this class; "precision", the share of the latter that belong to it; and "recall", the share of the former that
      were predicted as it. A share of no images is None.
    """
    found, images, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    return [
        {
            "class": name,
            "images": int(images[i]),
            "predicted": int(predicted[i]),
            "precision": float(found[i] / predicted[i]) if predicted[i] else None,
            "recall": float(found[i] / images[i]) if images[i] else None,
        }
        for i, name in enumerate(class_names)
    ]


def write_figures(
    directory: pathlib.Path, dataset: Any, outcomes: np.ndarray, title: str, seed: int, split: str = "test"
) -> list[dict[str, Any]]:
    """Writes predictions.png with 16 images, and confusion.png of all images.

    Mistakes come first, the most confident ones at the front; random images fill the rest.

    Args:
      directory: created if it does not exist.
      dataset: only its `class_names` and `images(split, indices)` are used.
      outcomes: int (N, 3), label, predicted class and its probability in millionths for each image of the split; −1
        for a missing image.
      title: the figures' title; the accuracy is added.
      seed: determines the random images.
      split: "test" or "validation".

    Returns:
      See per_class.
    """
    directory.mkdir(parents=True, exist_ok=True)
    names = dataset.class_names
    confusion = confusion_matrix(outcomes, len(names))
    right, count = int(np.trace(confusion)), int(confusion.sum())
    title = f"{title}\n{right:,} of {count:,} {split} images right ({right / count:.2%})"
    chosen = _chosen(outcomes, seed)
    labels, predicted, certainty = outcomes[chosen].T
    images = list(dataset.images(split, chosen))
    with readable(names):
        classes.predictions(images, labels, predicted, names, directory / "predictions.png", title, certainty / 1e6)
        classes.confusion(confusion, names, directory / "confusion.png", title)
    return per_class(confusion, names)


def _chosen(outcomes: np.ndarray, seed: int) -> np.ndarray:
    """Returns the indices of the images to show."""
    there = outcomes[:, 0] >= 0
    wrong = np.flatnonzero(there & (outcomes[:, 0] != outcomes[:, 1]))
    wrong = wrong[np.argsort(-outcomes[wrong, 2], kind="stable")][:EXAMPLES]
    right = np.flatnonzero(there & (outcomes[:, 0] == outcomes[:, 1]))
    drawn = np.random.default_rng(seed).choice(right, min(EXAMPLES - len(wrong), len(right)), replace=False)
    return np.concatenate([wrong, drawn]).astype(np.int64)
