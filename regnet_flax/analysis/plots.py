"""Every figure; the only module that imports matplotlib."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

TRAIN, TEST, DROP = "#1f77b4", "#d62728", "#999999"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _column(lines: Sequence[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    chosen = [line for line in lines if name in line]
    return [line["epoch"] for line in chosen], [line[name] for line in chosen]


def curves(lines: Sequence[dict[str, Any]], path: pathlib.Path, title: str = "", drops: Sequence[float] = ()) -> None:
    """Loss and accuracy over the epochs, training and test, with the learning rate's drops marked.

    Args:
      lines: of metrics.jsonl.
      path: the picture to write.
      title: above it.
      drops: the epochs at which the learning rate falls; those beyond the last line are not drawn.
    """
    plt = _pyplot()
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
        last = max((line["epoch"] for line in lines), default=0)
        for index, epoch in enumerate(epoch for epoch in drops if epoch <= last):
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


def losses(curves: dict[str, Sequence[float]], path: pathlib.Path, title: str = "") -> None:
    """Loss by step of several runs, over one another, and how far each is from the first.

    Args:
      curves: from a run's name to its loss at each step.
      path: the picture to write.
      title: above it.
    """
    plt = _pyplot()
    figure, (overlaid, apart) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    (first, reference), *others = curves.items()
    overlaid.plot(reference, label=first, linewidth=3, alpha=0.4)
    for name, values in others:
        overlaid.plot(values, label=name, linewidth=1)
        apart.plot(
            [abs(a - b) for a, b in zip(values, reference, strict=True)], label=f"|{name} − {first}|", linewidth=1
        )
    for axes in (overlaid, apart):
        axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend()
    overlaid.set_ylabel("loss (cross-entropy, nats)")
    apart.set_ylabel("difference")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
