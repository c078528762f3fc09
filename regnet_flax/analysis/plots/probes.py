"""Figures of a trained network's blocks, after the paper, and of its use of the regulators' state."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from regnet_flax.analysis.features import BlockFeatures
from regnet_flax.analysis.plots import TEST, TRAIN, pyplot, write
from regnet_flax.analysis.plots.features import DPI, MAP, show
from regnet_flax.analysis.state_use import StageUse


def readouts(accuracies: Mapping[str, Mapping[str, float]], path: pathlib.Path, title: str = "") -> None:
    """Plots the accuracy of the last layer on each of the last blocks, one line per model; figure 1(b) of the paper.

    Args:
      accuracies: maps a model's name to the result of `readout.readouts`.
      path: the picture to write.
      title: the figure's title.
    """
    plt = pyplot()
    names = max((list(found) for found in accuracies.values()), key=len)
    figure, axes = plt.subplots(figsize=(max(4.5, 1.2 + 0.8 * len(names)), 3.4), layout="constrained")
    for index, (model, found) in enumerate(accuracies.items()):
        values = [100 * value for value in found.values()]
        axes.plot([names.index(name) for name in found], values, marker="o", label=model, color=f"C{index}")
        for name, value in zip(found, values, strict=True):
            above = value == max(100 * other.get(name, 0) for other in accuracies.values())
            place = (names.index(name), value)
            axes.annotate(
                f"{value:.1f}", place, (0, 5 if above else -12), textcoords="offset points", ha="center", fontsize=8
            )
    axes.set_xticks(range(len(names)), names)
    axes.set_xlabel("block (stage.block)")
    axes.set_ylabel("accuracy of the last layer, %")
    axes.margins(x=0.08, y=0.15)
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    axes.set_title(title, fontsize="medium")
    write(figure, path, dpi=DPI)


def consecutive_blocks(
    models: Mapping[str, Sequence[BlockFeatures]],
    picture: np.ndarray,
    path: pathlib.Path,
    *,
    stage: int = 1,
    image: int = 0,
    count: int = 3,
) -> None:
    """Draws input, O, I and H of consecutive blocks, one model beside another; figure 1(a) of the paper.

    O is a block's output; with a regulator, I is its input and H its state. Maps are means over the channels, each on
    its own grey scale.

    Args:
      models: maps a name to a model's blocks, from `features.inspect`.
      picture: the image to show, (height, width, 1 or 3).
      path: the picture to write.
      stage: the stage to show.
      image: the index of the image.
      count: how many blocks to show, from the stage's first.
    """
    plt = pyplot()
    chosen = {name: [block for block in blocks if block.stage == stage][:count] for name, blocks in models.items()}
    rows = max(map(len, chosen.values()))
    kinds = {name: ["O"] if blocks[0].regulated is None else ["I", "H", "O"] for name, blocks in chosen.items()}
    widths = [1.3, *(len(kinds[name]) for name in chosen)]
    figure = plt.figure(figsize=(1.5 * sum(widths) + 0.4, 1.5 * rows + 0.7), layout="constrained")
    first, *parts = figure.subfigures(1, len(widths), width_ratios=widths, squeeze=False)[0]
    show(first.subplots(), picture.squeeze(), cmap="gray")
    first.suptitle("input", fontsize="medium")
    for part, (name, blocks) in zip(parts, chosen.items(), strict=True):
        part.suptitle(name, fontweight="bold", fontsize="medium")
        grid = part.subplots(rows, len(kinds[name]), squeeze=False)
        for row in range(rows):
            for column, kind in enumerate(kinds[name]):
                axes = grid[row, column]
                if row >= len(blocks):
                    axes.axis("off")
                    continue
                block = blocks[row]
                maps = {"O": block.output, "I": block.regulated, "H": block.state.get("H")}[kind]
                assert maps is not None
                show(axes, maps[image].mean(-1), cmap="gray")
                if row == 0:
                    axes.set_title(kind, fontsize="medium")
                if column == 0:
                    axes.set_ylabel(f"block {block.name}", fontsize="small")
    write(figure, path, dpi=DPI)


def state_use(stages: Sequence[StageUse], path: pathlib.Path, title: str = "") -> None:
    """Plots the norms of both halves of each fusing convolution, and the change of the logits without H, by stage.

    Args:
      stages: from `state_use.state_use`.
      path: the picture to write.
      title: the figure's title.
    """
    plt = pyplot()
    norms = {name: pair for stage in stages for name, pair in stage.norms.items()}
    figure, (left, right) = plt.subplots(
        1,
        2,
        figsize=(4.5 + 0.4 * len(norms), 3.4),
        width_ratios=[len(norms), 1 + 1.5 * len(stages)],
        layout="constrained",
    )
    places = np.arange(len(norms))
    for offset, label, color, half in ((-0.2, "X", TRAIN, 0), (0.2, "H", TEST, 1)):
        left.bar(places + offset, [pair[half] for pair in norms.values()], 0.4, color=color, label=label)
    left.set_xticks(places, norms)
    left.set_xlabel("block (stage.block)")
    left.set_ylabel("norm of the 1×1's half")
    left.margins(y=0.25)  # for the legend
    left.legend(title="of", ncols=2, loc="upper right")
    for place, stage in enumerate(stages):
        right.bar(place, 100 * stage.logits_change, 0.6, color=TEST)
        text = f"{stage.predictions_change:.1%}\nof the\nclasses"
        right.annotate(
            text, (place, 100 * stage.logits_change), (0, 3), textcoords="offset points", ha="center", fontsize=7
        )
    right.set_xticks(range(len(stages)), [str(stage.stage) for stage in stages])
    right.set_xlabel("stage where H is zero")
    right.set_ylabel("change of the logits, %")
    right.margins(y=0.3)
    figure.suptitle(title, fontsize="medium")
    write(figure, path, dpi=DPI)


def grad_cam(
    pictures: np.ndarray, maps: Mapping[str, np.ndarray], titles: Sequence[str], path: pathlib.Path, title: str = ""
) -> None:
    """Draws images, overlaid with Grad-CAM maps of some blocks.

    Args:
      pictures: the images to show, (N, height, width, 1 or 3).
      maps: maps a block's name to the result of `grad_cam.grad_cam`, (N, height, width) each.
      titles: the titles of the N images.
      path: the picture to write.
      title: the figure's title.
    """
    plt = pyplot()
    height, width = pictures.shape[1:3]
    figure, grid = plt.subplots(
        1 + len(maps),
        len(pictures),
        figsize=(0.7 + 1.35 * len(pictures), 0.5 + 1.45 * (1 + len(maps))),
        squeeze=False,
        layout="constrained",
    )
    for column, picture in enumerate(pictures):
        show(grid[0, column], picture.squeeze(), cmap="gray")
        grid[0, column].set_title(titles[column], fontsize="small")
    for row, (name, found) in enumerate(maps.items(), start=1):
        grid[row, 0].set_ylabel(f"block {name}", fontsize="small")
        for column, picture in enumerate(pictures):
            extent: Any = (-0.5, width - 0.5, height - 0.5, -0.5)
            show(grid[row, column], picture.squeeze(), cmap="gray", extent=extent)
            # If no position supports the class, nothing is drawn.
            top = found[column].max() or 1.0
            grid[row, column].imshow(
                found[column], cmap=MAP, alpha=0.6, extent=extent, interpolation="bilinear", vmin=0, vmax=top
            )
    figure.suptitle(title, fontsize="medium")
    write(figure, path, dpi=DPI)
