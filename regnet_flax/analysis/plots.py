"""Every figure; the only module that imports matplotlib."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

TRAIN, TEST, DROP = "#1f77b4", "#d62728", "#999999"


def _column(lines: Sequence[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    chosen = [line for line in lines if name in line]
    return [line["epoch"] for line in chosen], [line[name] for line in chosen]


def _drops(lines: Sequence[dict[str, Any]]) -> list[float]:
    """The epochs at which the learning rate fell by a factor of two or more between two lines."""
    epochs, rates = _column(lines, "learning_rate")
    return [epochs[i - 1] for i in range(1, len(rates)) if rates[i] <= rates[i - 1] / 2 and rates[i] > 0]


def curves(lines: Sequence[dict[str, Any]], path: pathlib.Path, title: str = "") -> None:
    """Loss and accuracy over the epochs, training and test, with the learning rate's drops marked.

    Args:
      lines: of metrics.jsonl.
      path: the picture to write.
      title: above it.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import PercentFormatter

    figure, (loss, accuracy) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for axes, metric, name in ((loss, "loss", "loss (cross-entropy, nats)"), (accuracy, "accuracy", "accuracy")):
        for split, color, label in (("train", TRAIN, "training"), ("eval", TEST, "test")):
            epochs, values = _column(lines, f"{split}_{metric}")
            if epochs:
                marker = "o" if len(epochs) < 5 else None
                axes.plot(epochs, values, color=color, label=label, marker=marker, linewidth=1.5)
        if metric == "loss" and axes.lines:
            axes.set_yscale("log")
        for index, epoch in enumerate(_drops(lines)):
            label = "learning rate drops" if index == 0 else None
            axes.axvline(epoch, color=DROP, linestyle=":", linewidth=1, label=label)
        axes.set_xlabel("epoch")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    epochs, values = _column(lines, "eval_accuracy")
    if values:
        accuracy.annotate(
            f"{values[-1]:.2%}",
            (epochs[-1], values[-1]),
            xytext=(-4, -14),
            textcoords="offset points",
            ha="right",
            color=TEST,
        )
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
