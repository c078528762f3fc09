"""Figures of a model's activations, from `features.inspect`."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from regnet_flax.analysis.features import BlockFeatures, cosine_similarity
from regnet_flax.analysis.plots import DROP, pyplot, write

MAP, DARK_ABOVE, DPI = "viridis", 0.75, 110


def show(axes: Any, array: np.ndarray, **options: Any) -> Any:
    """Draws an image without ticks."""
    axes.set_xticks([])
    axes.set_yticks([])
    return axes.imshow(array, interpolation="nearest", **options)


def colors(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Returns the figures' colours for values (…) between `low` and `high`, as uint8 (…, 3)."""
    import matplotlib

    shares = (values - low) / ((high - low) or 1.0)
    return matplotlib.colormaps[MAP](shares, bytes=True)[..., :3]


def feature_maps(
    models: Mapping[str, Sequence[BlockFeatures]],
    path: pathlib.Path,
    *,
    stage: int = 1,
    image: int = 0,
    channels: int = 6,
) -> None:
    """Draws the outputs of a stage's consecutive blocks, one model below another.

    Args:
      models: maps a name to a model's blocks.
      path: the picture to write.
      stage: the stage to show.
      image: the index of the image.
      channels: how many channels to show: those that vary most over the image in the first block. A channel has the
        same grey scale in all blocks.
    """
    plt = pyplot()
    chosen = {name: [block for block in blocks if block.stage == stage] for name, blocks in models.items()}
    height = sum(0.35 + 1.05 * len(blocks) for blocks in chosen.values())
    figure = plt.figure(figsize=(1.3 + 1.02 * channels, height), layout="constrained")
    parts = figure.subfigures(len(chosen), 1, squeeze=False, height_ratios=[len(b) for b in chosen.values()])
    for part, (name, blocks) in zip(parts[:, 0], chosen.items(), strict=True):
        maps = np.stack([block.output[image] for block in blocks])  # (blocks, height, width, channels)
        kept = np.sort(np.argsort(maps[0].std((0, 1)))[::-1][:channels])
        part.suptitle(name, fontweight="bold", fontsize="medium")
        grid = part.subplots(len(blocks), len(kept), squeeze=False)
        for row, block in enumerate(blocks):
            for column, channel in enumerate(kept):
                top = maps[..., channel].max() or 1.0
                show(grid[row, column], maps[row, ..., channel], cmap="gray", vmin=0, vmax=top)
                if row == 0:
                    grid[row, column].set_title(f"channel {channel}", fontsize="small")
            label = f"block {block.name}"
            if row:
                alike = cosine_similarity(maps[row - 1 : row], maps[row : row + 1])
                label += f"\ncosine to {blocks[row - 1].name}:\n{alike:.2f}"
            grid[row, 0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize="small")
    write(figure, path, dpi=DPI)


def similarity(matrices: Mapping[str, np.ndarray], names: Sequence[str], path: pathlib.Path, title: str = "") -> None:
    """Draws similarity matrices of blocks side by side, on one scale.

    Args:
      matrices: maps a name to (K, K), from `features.similarity`; nan stays blank.
      names: the names of the K blocks.
      path: the picture to write.
      title: the figure's title.
    """
    plt = pyplot()
    count = len(names)
    size = max(3.2, 0.46 * count)
    figure, grid = plt.subplots(
        1, len(matrices), figsize=(size * len(matrices) + 1, size + 0.6), squeeze=False, layout="constrained"
    )
    low = min(np.nanmin(matrix) for matrix in matrices.values())
    drawn = None
    for axes, (name, matrix) in zip(grid[0], matrices.items(), strict=True):
        drawn = axes.imshow(matrix, cmap=MAP, vmin=low, vmax=1)
        for i, j in np.argwhere(~np.isnan(matrix)):
            dark = matrix[i, j] < low + DARK_ABOVE * (1 - low)
            axes.text(
                j,
                i,
                f"{matrix[i, j]:.2f}".removeprefix("0"),
                ha="center",
                va="center",
                fontsize=7,
                color="white" if dark else "black",
            )
        axes.set_xticks(range(count), names)
        axes.set_yticks(range(count), names)
        axes.set_xlabel("block (stage.block)")
        axes.set_title(name)
    figure.colorbar(drawn, ax=grid, shrink=0.8)
    figure.suptitle(title)
    write(figure, path, dpi=DPI)


def _by_stage(blocks: Sequence[BlockFeatures]) -> list[list[int]]:
    """Returns the positions of each stage's blocks: lines break where a new stage resets the state."""
    stages = dict.fromkeys(block.stage for block in blocks)
    return [[i for i, block in enumerate(blocks) if block.stage == stage] for stage in stages]


def _bands(axes: Any, blocks: Sequence[BlockFeatures], arrays: Sequence[np.ndarray], color: str) -> None:
    levels = np.array([np.quantile(array, (0.05, 0.25, 0.5, 0.75, 0.95)) for array in arrays]).T
    for places in _by_stage(blocks):
        for low, high, alpha in ((0, 4, 0.2), (1, 3, 0.4)):
            axes.fill_between(places, levels[low, places], levels[high, places], color=color, alpha=alpha, linewidth=0)
        axes.plot(places, levels[2, places], color=color, marker="o", markersize=4)
    for places in _by_stage(blocks)[1:]:
        axes.axvline(places[0] - 0.5, color=DROP, linestyle=":", linewidth=1)
    axes.set_xticks(range(len(blocks)), [block.name for block in blocks])
    axes.set_xlabel("block (stage.block)")
    axes.grid(alpha=0.3)


def gates(blocks: Sequence[BlockFeatures], path: pathlib.Path, title: str = "") -> None:
    """Plots each gate's activations by block: the median, and the middle 50 % and 90 % of all values.

    Args:
      blocks: from `features.inspect`; those without a regulator are skipped.
      path: the picture to write.
      title: the figure's title.

    Raises:
      ValueError: no block has a regulator with gates.
    """
    blocks = [block for block in blocks if block.gates]
    if not blocks:
        raise ValueError("no block has a regulator with gates: take a RegNet's blocks, not a ResNet's")
    plt = pyplot()
    names = list(blocks[0].gates)
    width = max(2.2, 0.33 * len(blocks))
    figure, grid = plt.subplots(
        1, len(names), figsize=(width * len(names) + 0.6, 3), squeeze=False, layout="constrained"
    )
    for index, (axes, name) in enumerate(zip(grid[0], names, strict=True)):
        arrays = [block.gates[name] for block in blocks]
        _bands(axes, blocks, arrays, f"C{index}")
        low, high = min(array.min() for array in arrays), max(array.max() for array in arrays)
        # From −1 for tanh, from 0 for σ; a custom cell may exceed these.
        axes.set_ylim(min(low, -1.0 if low < 0 else 0.0) - 0.03, max(high, 1.0) + 0.03)
        axes.set_title(f"gate {name}")
    figure.suptitle(title)
    write(figure, path, dpi=DPI)


def state(blocks: Sequence[BlockFeatures], path: pathlib.Path, *, image: int = 0, title: str = "") -> None:
    """Draws the regulator's state by block, its time: maps for one image, and below them all values of all images.

    Args:
      blocks: from `features.inspect`; those without a regulator are skipped.
      path: the picture to write.
      image: the index of the image for the maps, which show the root mean square over the channels, on one scale per
        stage.
      title: the figure's title.

    Raises:
      ValueError: no block has a regulator.
    """
    blocks = [block for block in blocks if block.state]
    if not blocks:
        raise ValueError("no block has a regulator: take a RegNet's blocks, not a ResNet's")
    plt = pyplot()
    names = list(blocks[0].state)
    figure = plt.figure(figsize=(0.8 + 0.95 * len(blocks), 1.3 * len(names) + 2.9), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.3 * len(names), 2.6])
    grid = above.subplots(len(names), len(blocks), squeeze=False)
    for row, name in enumerate(names):
        maps = [np.sqrt((block.state[name][image] ** 2).mean(-1)) for block in blocks]
        for places in _by_stage(blocks):
            top = max(maps[place].max() for place in places) or 1.0
            for place in places:
                show(grid[row, place], maps[place], cmap=MAP, vmin=0, vmax=top)
                if row == 0:
                    grid[row, place].set_title(f"block {blocks[place].name}", fontsize="small")
        grid[row, 0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize="large")
    for index, (axes, name) in enumerate(zip(below.subplots(1, len(names), squeeze=False)[0], names, strict=True)):
        _bands(axes, blocks, [block.state[name] for block in blocks], f"C{index}")
        axes.set_title(f"{name}, all values", fontsize="medium")
    figure.suptitle(title)
    write(figure, path, dpi=DPI)
