"""The figures of a comparison, for light and dark pages."""

from __future__ import annotations

import contextlib
import pathlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from regnet_flax.analysis.plots import marker, pyplot, write
from regnet_flax.analysis.plots.axes import log_scale, whole_epochs

# Okabe and Ito's colours, which colour-blind people can tell apart; those for the dark page are lighter.
_LIGHT = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f")
_DARK = ("#f0f0f0", "#4aa8e0", "#ff8c42", "#2fd0a5", "#e7a5ca", "#9bdcff", "#ffc845", "#a0a0a0")
_MARKERS, _DASHES = "osD^vP*X", ("-", "--", "-.", ":")


@contextlib.contextmanager
def _page(dark: bool) -> Iterator[Any]:
    """Yields pyplot with the colours of a light or a dark page."""
    plt = pyplot()
    ink, paper = ("#e6e6e6", "#16181c") if dark else ("#1a1a1a", "#ffffff")
    colors = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink)
    faces = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), paper)
    with plt.rc_context(colors | faces | {"grid.color": "#888888", "font.size": 11}):
        yield plt


def _finish(figure: Any, axes: Any, names: Sequence[str], path: pathlib.Path) -> None:
    """Adds one legend below all axes, and writes the picture."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if max(map(len, names)) > 22 else min(4, len(names))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    write(figure, path, dpi=130)


def compared_curves(
    runs: Mapping[str, Mapping[str, tuple[Any, Any]]],
    path: pathlib.Path,
    *,
    dark: bool = False,
    split: str = "test",
) -> None:
    """Plots learning curves of several models: the mean over the seeds, in a band from the lowest to the highest.

    Args:
      runs: maps a model's name to "train_loss" and "error" (percent), each epochs (k,) and values (seeds, k); without
        epochs, no curve.
      path: the picture to write.
      dark: whether it is for a dark page.
      split: the split of the error.
    """
    with _page(dark) as plt:
        rows = -(-len(runs) // 3)
        figure, (loss, error) = plt.subplots(1, 2, figsize=(10, 4 + 0.25 * rows), layout="constrained")
        palette = _DARK if dark else _LIGHT
        ends, starts = [], []
        for number, (name, curves) in enumerate(runs.items()):
            color, dash = palette[number % len(palette)], _DASHES[number // len(palette) % len(_DASHES)]
            for axes, metric in ((loss, "train_loss"), (error, "error")):
                epochs, values = curves[metric]
                if not len(epochs):
                    continue
                options = {"color": color, "linestyle": dash, "label": name, "linewidth": 1.6}
                axes.plot(epochs, values.mean(0), marker=marker(epochs), **options)
                if len(values) > 1 and len(epochs) == 1:
                    axes.vlines(epochs, values.min(0), values.max(0), color=color, alpha=0.3, linewidth=4)
                elif len(values) > 1:
                    axes.fill_between(epochs, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
            if len(curves["error"][0]):
                mean = curves["error"][1].mean(0)
                ends.append(mean[len(mean) // 2 :].max())
                starts.append(mean.max())
        log_scale(loss)
        loss.set_ylabel("training loss (cross-entropy, nats)")
        error.set_ylabel(f"{split} error (%)")
        # The first epochs are far above the range in which the models differ.
        error.set_ylim(0, min(max(starts, default=0), 2.5 * max(ends, default=0)) * 1.05 or 1)
        for axes in (loss, error):
            axes.set_xlabel("epoch")
            whole_epochs(axes)
            axes.grid(alpha=0.3)
        _finish(figure, error, list(runs), path)


def compared_costs(
    runs: Mapping[str, tuple[int, int, Sequence[float]]], path: pathlib.Path, *, dark: bool = False
) -> None:
    """Plots test error against parameters and multiply-adds, one point per model: mean ± standard deviation.

    Args:
      runs: maps a model's name to its parameters, multiply-adds for one image, and each seed's test error (percent).
      path: the picture to write.
      dark: whether it is for a dark page.
    """
    with _page(dark) as plt:
        rows = -(-len(runs) // 3)
        figure, both = plt.subplots(1, 2, figsize=(10, 4 + 0.25 * rows), layout="constrained", sharey=True)
        palette = _DARK if dark else _LIGHT
        for number, (name, (parameters, multiply_adds, errors)) in enumerate(runs.items()):
            several = len(errors) > 1
            for axes, cost in zip(both, (parameters / 1e3, multiply_adds / 1e6), strict=True):
                axes.errorbar(
                    cost,
                    sum(errors) / len(errors),
                    yerr=statistics.stdev(errors) if several else None,
                    color=palette[number % len(palette)],
                    marker=_MARKERS[number % len(_MARKERS)],
                    linestyle="none",
                    markersize=8,
                    capsize=3,
                    label=name,
                )
        both[0].set_xlabel("parameters (thousands)")
        both[1].set_xlabel("multiply-adds for one image (millions)")
        both[0].set_ylabel("test error (%)")
        for axes in both:
            axes.grid(alpha=0.3)
            axes.set_xmargin(0.12)
            axes.xaxis.set_major_locator(plt.MaxNLocator(5))
        _finish(figure, both[0], list(runs), path)
