"""Figures of images and their classes: predictions, probabilities, and the confusion matrix."""

from __future__ import annotations

import math
import pathlib
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from regnet_flax.analysis.plots import pyplot
from regnet_flax.errors import printable

RIGHT, WRONG = "#1a7f37", "#cf222e"


def _wrapped(name: str, width: int, lines: int = 2) -> str:
    """Wraps a class name to a few lines of `width` characters, and ends longer ones with …."""
    name = printable(name.replace("_", " "))
    return _literal("\n".join(textwrap.wrap(name, width, max_lines=lines, placeholder="…")) or name)


def _literal(text: str) -> str:
    """Escapes text: between two dollar signs matplotlib expects mathematics."""
    return text.replace("$", r"\$")


def _show(axes: Any, image: np.ndarray, **options: Any) -> None:
    """Draws an image of 1 or 3 channels without axes; small images keep square pixels. `options` go to imshow."""
    small = max(image.shape[:2]) < 100
    axes.imshow(
        image.squeeze(-1) if image.shape[-1] == 1 else image,
        cmap="gray" if image.shape[-1] == 1 else None,
        vmin=0,
        vmax=255,
        interpolation="nearest" if small else "antialiased",
        **options,
    )


def predictions(
    images: Sequence[np.ndarray],
    labels: Sequence[int],
    predicted: Sequence[int],
    class_names: Sequence[str],
    path: pathlib.Path,
    title: str = "",
    shares: Sequence[float] = (),
) -> None:
    """Draws images under their predicted classes, green if right; if wrong, red and with the true class.

    Args:
      images: uint8 (height, width, channels) each.
      labels: the true classes.
      predicted: the predicted classes.
      class_names: the names of the labels.
      path: the picture to write.
      title: the figure's title.
      shares: the probabilities of the predicted classes, which are shown too.
    """
    plt = pyplot()
    texts = []
    for index, (label, guess) in enumerate(zip(labels, predicted, strict=True)):
        text = _wrapped(class_names[guess], 20) + (f" {shares[index]:.0%}" if len(shares) else "")
        texts.append(text if guess == label else f"{text}\n{_wrapped('true: ' + class_names[label], 20)}")
    columns, side, line = min(4, len(images)), 2.0, 0.17  # an image's side and a line of text, in inches
    rows = [texts[i : i + columns] for i in range(0, len(texts), columns)]
    above = [0.25 + line * max(1 + text.count("\n") for text in row) for row in rows]
    width, height = (side + 0.2) * columns, side * len(rows) + sum(above)
    # One Axes for all: laying out one per image would take most of the time.
    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    for index, (image, label, guess, text) in enumerate(zip(images, labels, predicted, texts, strict=True)):
        row, column = divmod(index, columns)
        x, y = (side + 0.2) * (column + 0.5), side * (row + 0.5) + sum(above[: row + 1])
        down, across = (side / 2 * n / max(image.shape[:2]) for n in image.shape[:2])
        _show(axes, image, aspect="auto", extent=(x - across, x + across, y + down, y - down))
        color = RIGHT if guess == label else WRONG
        axes.text(x, y - down - 0.07, text, ha="center", va="bottom", color=color, fontsize=10)
    figure.suptitle(title, y=1, va="bottom")
    figure.savefig(path, dpi=120, bbox_inches="tight")  # the title is above, and may be wider than one image
    plt.close(figure)


def probabilities(
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    tops: Sequence[Sequence[tuple[str, float]]],
    path: pathlib.Path,
    title: str = "",
) -> None:
    """Draws images, each above bars of its most probable classes.

    Args:
      images: uint8 (height, width, channels) each, of any size.
      captions: one per image; further ones are ignored.
      tops: the most probable classes of each image and their probabilities, the first on top; further ones are ignored.
      path: the picture to write.
      title: the figure's title.
    """
    plt = pyplot()
    columns = min(4, len(images))
    rows, bars = math.ceil(len(images) / columns), len(tops[0])
    heights = [2.4, 0.35 * bars + 0.25] * rows
    figure, grid = plt.subplots(
        2 * rows,
        columns,
        figsize=(2.9 * columns, sum(heights) + 0.3 * rows),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for index, (image, caption, top) in enumerate(zip(images, captions, tops, strict=False)):
        row, column = divmod(index, columns)
        picture, chart = grid[2 * row, column], grid[2 * row + 1, column]
        _show(picture, image)
        picture.set_anchor("S")
        caption = printable(caption)
        picture.set_title(_literal(caption if len(caption) <= 32 else f"{caption[:15]}…{caption[-16:]}"), fontsize=9)
        shares = [share for _, share in top]
        chart.barh(range(bars), shares, color=["#7fb3dc", *["#d0d7de"] * (bars - 1)], height=0.85)
        for place, (name, share) in enumerate(top):
            chart.text(0.02, place, _wrapped(name, 26, lines=1), va="center", fontsize=9)
            chart.text(1, place, f"{share:.1%}", va="center", ha="right", fontsize=9)
        chart.set(xlim=(0, 1), ylim=(bars - 0.5, -0.5))
    figure.suptitle(title)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def confusion(matrix: np.ndarray, class_names: Sequence[str], path: pathlib.Path, title: str = "") -> None:
    """Draws the confusion matrix as each row's shares, with counts and names if there is room for them.

    If there is no room for counts, a list beside the matrix names the pairs that are confused most often.

    Args:
      matrix: int (classes, classes), one row per true class, one column per predicted class.
      class_names: the names of its rows and columns.
      path: the picture to write.
      title: the figure's title.
    """
    plt = pyplot()
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import PercentFormatter

    classes = len(matrix)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    named, counted = classes <= 100, classes <= 25
    side = float(np.clip(0.42 * classes if counted else 0.13 * classes, 3, 9))
    figure, axes = plt.subplots(figsize=(side + 3, side + 1.6), layout="constrained")
    # The square root makes rare confusions visible.
    shown = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="auto")
    bar = figure.colorbar(shown, shrink=0.8, format=PercentFormatter(1.0), ticks=[0, 0.01, 0.05, 0.2, 0.5, 1])
    bar.set_label("share of the true class (square-root scale)")
    if counted:
        size = float(np.clip(side * 26 / classes, 5, 10))
        for (row, column), count in np.ndenumerate(matrix):
            if count:
                color = "white" if shares[row, column] > 0.4 else "black"
                axes.text(column, row, f"{count}", ha="center", va="center", color=color, fontsize=size)
    if named:
        size = float(np.clip(side * 60 / classes, 5, 10))
        names = [_wrapped(name, 18, lines=2 if counted else 1) for name in class_names]
        room = side / classes * 72 / size * 1.6  # characters that fit into a column
        axes.set_xticks(range(classes), names, rotation=90 if max(map(len, names)) > room else 0, fontsize=size)
        recalls = [f"{name}  {matrix[i, i] / max(1, matrix[i].sum()):.0%}" for i, name in enumerate(names)]
        found = [recall if matrix[i].any() else f"{names[i]}  –" for i, recall in enumerate(recalls)]
        axes.set_yticks(range(classes), found, fontsize=size)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class and its recall" if named else "true class")
    if not counted:
        figure.text(1.01, 0.5, _most_confused(matrix, class_names), va="center", linespacing=1.7)
    figure.suptitle(title)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def _most_confused(matrix: np.ndarray, class_names: Sequence[str], pairs: int = 15) -> str:
    wrong = matrix - np.diag(np.diag(matrix))
    lines = ["most frequent confusions"]
    for index in np.argsort(-wrong, axis=None, kind="stable")[:pairs]:
        row, column = divmod(int(index), len(matrix))
        if wrong[row, column]:
            true, given = (_wrapped(class_names[i], 24, lines=1) for i in (row, column))
            lines.append(f"{true} → {given}: {wrong[row, column]} of {matrix[row].sum()}")
    return "\n".join(lines)
