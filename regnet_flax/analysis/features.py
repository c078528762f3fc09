"""Looks inside a model: each block's output, its regulator's state and gates, and how similar the blocks are."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from regnet_flax.models.regnet import CELLS, unstack_blocks

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class BlockFeatures:
    """The activations of one block for a batch of N images; all arrays are float32.

    Attributes:
      stage: from 1.
      block: its number in the stage, from 1.
      output: (N, height, width, channels), the next block's input.
      state: the regulator's state after this block by name, "H" and, for an LSTM, "C": (N, height, width, n) each; {}
        without a regulator.
      gates: the regulator's activations by name, in the order of the cell's `gate_names`: (N, height, width, n) each;
        {} without a regulator.
      regulated: the regulator's input, X2 in the paper: (N, height, width, n); None without a regulator.
    """

    stage: int
    block: int
    output: Array
    state: dict[str, Array]
    gates: dict[str, Array]
    regulated: Array | None = None

    @property
    def name(self) -> str:
        """The block's name, such as "1.2" for the second block of the first stage."""
        return f"{self.stage}.{self.block}"


def inspect(model: nn.Module, variables: dict[str, Any], images: Any) -> list[BlockFeatures]:
    """Runs images through a model and records each block's activations.

    Args:
      model: any model from create_model.
      variables: "params" and "batch_stats".
      images: normalised, (N, height, width, channels). All activations stay in memory: use a few hundred images.

    Returns:
      The blocks, in the order in which they run.
    """
    found = sown_blocks(jax.device_get(_intermediates(model, variables, images)))
    return [_block(*place, sown, getattr(model, "regulator", None)) for place, sown in found.items()]


@functools.partial(jax.jit, static_argnames="model")
def _intermediates(model: nn.Module, variables: Any, images: Any) -> Any:
    _, updates = model.apply(variables, images, train=False, mutable=["intermediates"])
    return updates["intermediates"]


def sown_blocks(intermediates: Mapping[str, Any]) -> dict[tuple[int, int], dict[str, Any]]:
    """Returns the intermediates of a model's blocks by (stage, block), each from 1, in the order in which they run."""
    found = unstack_blocks(intermediates)
    # RegNetY's blocks are not nested in stages, but named stage1_block1 and so on.
    found |= {f"{stage}_{name}": sown for stage, tree in found.items() for name, sown in tree.items()}
    matches = {name: re.fullmatch(r"stage(\d+)_block(\d+)", name) for name in found}
    blocks = {(int(match[1]), int(match[2])): found[name] for name, match in matches.items() if match}
    return dict(sorted(blocks.items()))


def _block(stage: int, block: int, sown: dict[str, Any], regulator: str | None) -> BlockFeatures:
    state, gates = {}, {}
    if "gates" in sown:  # not every stage of a RegNet has a regulator
        assert regulator is not None
        cell, ((values,), (arrays,)) = CELLS[regulator], (sown["gates"], sown["state"])
        gates = {name: _float32(values[name]) for name in cell.gate_names}
        state = {name: _float32(array) for name, array in zip(cell.state_names, arrays, strict=True)}
    regulated = _float32(sown["regulated"][0]) if gates else None
    return BlockFeatures(stage, block, _float32(sown["output"][0]), state, gates, regulated)


def _float32(array: Any) -> Array:
    return np.asarray(array, np.float32)


def gate_ranges(blocks: Sequence[BlockFeatures]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Computes where most values of each gate lie; a sigmoid that stays near 0.5 decides nothing.

    Args:
      blocks: from `inspect`.

    Returns:
      Maps "1.1" and so on, stage and block, and each activation's name to the 1st, 50th and 99th percentile over all
      images, positions and channels. Blocks without a regulator are left out.
    """
    return {
        block.name: {
            name: tuple(float(value) for value in np.percentile(values, (1, 50, 99)))  # pyright: ignore
            for name, values in block.gates.items()
        }
        for block in blocks
        if block.gates
    }


def linear_cka(x: Array, y: Array) -> float:
    """Linear centred kernel alignment (Kornblith et al., arXiv 1905.00414, section 3).

    Args:
      x, y: two representations of the same N examples, (N, …), of any sizes: the axes after N are flattened.

    Returns:
      Between 0 and 1; 1 if the two differ only by a rotation, a shift and a scale; nan if one does not vary. With fewer
      examples than entries per vector the value is too high, so compare only values with equal numbers of both.
    """
    return float(_cosines(_centred_gram(x), _centred_gram(y)).mean())


def cosine_similarity(x: Array, y: Array) -> float:
    """Computes the cosine between two representations of each example, averaged over N examples.

    Args:
      x, y: (N, …), of the same shape: the axes after N are flattened.

    Returns:
      Between −1 and 1, and at least 0 if no entry is negative, as after a ReLU; nan if a vector is zero.

    Raises:
      ValueError: the shapes differ.
    """
    if x.shape != y.shape:
        raise ValueError(f"there is no cosine between shapes {x.shape} and {y.shape}: give two of the same shape")
    return float(_cosines(_vectors(x), _vectors(y)).mean())


def _vectors(x: Array) -> Array:
    return x.reshape(len(x), -1).astype(np.float64)


def _centred_gram(x: Array) -> Array:
    """(1, N²); the alignment of two kernels is the cosine between their centred Gram matrices."""
    vectors = _vectors(x)
    vectors = vectors - vectors.mean(0)
    return (vectors @ vectors.T).reshape(1, -1)


def _cosines(a: Array, b: Array) -> Array:
    with np.errstate(invalid="ignore"):
        return (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))


_REPRESENTATIONS = {"cka": _centred_gram, "cosine": _vectors}


def similarity(blocks: Sequence[BlockFeatures], measure: str = "cka") -> Array:
    """Computes the similarity of all blocks' outputs, pair by pair.

    Args:
      blocks: K blocks, from `inspect`.
      measure: "cka", or "cosine", which is nan between outputs of different shapes.

    Returns:
      (K, K), float64.

    Raises:
      ValueError: the measure is unknown.
    """
    if measure not in _REPRESENTATIONS:
        raise ValueError(f"measure is {measure!r}: it must be one of {', '.join(map(repr, _REPRESENTATIONS))}")
    compared = [_REPRESENTATIONS[measure](block.output) for block in blocks]
    out = np.full((len(blocks), len(blocks)), np.nan)
    for i, j in np.ndindex(out.shape):
        if compared[i].shape == compared[j].shape:
            out[i, j] = _cosines(compared[i], compared[j]).mean()
    return out


def neighbour_similarity(blocks: Sequence[BlockFeatures], measure: str = "cka") -> dict[str, float]:
    """Computes the similarity of each block's output to that of the previous block in its stage.

    Args:
      blocks, measure: see `similarity`.

    Returns:
      Maps "1.1–1.2" and so on to a number; the paper argues that a regulator lowers it.
    """
    return {
        f"{first.name}–{second.name}": float(similarity([first, second], measure)[0, 1])
        for first, second in itertools.pairwise(blocks)
        if first.stage == second.stage
    }
