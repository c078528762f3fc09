"""Figures of training: learning curves."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from regnet_flax.analysis.plots import DROP, TEST, TRAIN, marker, pyplot
from regnet_flax.analysis.plots.axes import log_scale, whole_epochs


def _column(lines: Sequence[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    chosen = [line for line in lines if name in line]
    return [line["epoch"] for line in chosen], [line[name] for line in chosen]


def curves(
    lines: Sequence[dict[str, Any]],
    path: pathlib.Path,
    title: str = "",
    drops: Sequence[float] = (),
    split: str = "test",
) -> None:
    """Plots loss and accuracy by epoch, for training and the evaluated split, and marks drops of the learning rate.

    Args:
      lines: the lines of metrics.jsonl.
      path: the picture to write.
      title: the figure's title.
      drops: the epochs at which the learning rate falls; those beyond the last line are not drawn.
      split: the evaluated split, "test" or "validation".
    """
    plt = pyplot()
    from matplotlib.ticker import PercentFormatter

    figure, (loss, accuracy) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for axes, metric, name in ((loss, "loss", "loss (cross-entropy, nats)"), (accuracy, "accuracy", "accuracy")):
        for kind, color, label in (("train", TRAIN, "training"), ("eval", TEST, split)):
            epochs, values = _column(lines, f"{kind}_{metric}")
            if epochs:
                axes.plot(epochs, values, color=color, label=label, marker=marker(epochs), linewidth=1.5)
        if metric == "loss" and axes.lines:
            log_scale(axes)
        last = max((line["epoch"] for line in lines), default=0)
        for index, epoch in enumerate(epoch for epoch in drops if epoch <= last):
            label = "learning rate drops" if index == 0 else None
            axes.axvline(epoch, color=DROP, linestyle=":", linewidth=1, label=label)
        axes.set_xlabel("epoch")
        whole_epochs(axes)
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    _, values = _column(lines, "eval_accuracy")
    if values:  # beside the axes, where there are no lines
        accuracy.annotate(
            f"{values[-1]:.2%}",
            (1, values[-1]),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=TEST,
            annotation_clip=False,
        )
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def losses(curves: dict[str, Sequence[float]], path: pathlib.Path, title: str = "") -> None:
    """Plots the loss of several runs by step, and each run's distance from the first.

    Args:
      curves: maps a run's name to its loss at each step.
      path: the picture to write.
      title: the figure's title.
    """
    plt = pyplot()
    figure, (overlaid, apart) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    (first, reference), *others = curves.items()
    overlaid.plot(reference, label=first, linewidth=3, alpha=0.4)
    for name, values in others:
        overlaid.plot(values, label=name, linewidth=1)
        apart.plot(
            [abs(a - b) for a, b in zip(values, reference, strict=True)], label=f"|{name} − {first}|", linewidth=1
        )
    for axes in (overlaid, apart):
        log_scale(axes)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend()
    overlaid.set_ylabel("loss (cross-entropy, nats)")
    apart.set_ylabel("difference")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
