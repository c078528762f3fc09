"""Exact metrics over a whole split, and by class."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from regnet_flax.errors import DataError


def evaluate(
    eval_step: Callable[[int], dict[str, jax.Array]],
    size: int,
    batch_size: int,
    poll: Callable[[int], None] = lambda done: None,
    outcomes: np.ndarray | None = None,
) -> dict[str, float]:
    """Counts every one of `size` examples once.

    Args:
      eval_step: from the index of a batch's first example to steps.eval_step's sums.
      size: examples in the split.
      batch_size: examples a batch; the last may be short.
      poll: called after each batch with the examples done so far.
      outcomes: int (size, 2), is filled with each example's label and predicted class.

    Returns:
      "loss" and "accuracy", means over the examples, "top5_accuracy" where there are more than five classes, and
      "count".

    Raises:
      DataError: every example is masked out.
    """
    sums = []
    for start in range(0, size, batch_size):
        sums.append(eval_step(start))
        # Two batches in flight keep a device busy; more would only delay what waits for the poll.
        jax.block_until_ready(sums[max(0, len(sums) - 3)])
        poll(min(size, start + batch_size))
    totals = {
        name: np.sum([np.asarray(s[name]) for s in sums], dtype=np.float64) for name in sums[0] if name != "outcomes"
    }
    if outcomes is not None:
        outcomes[:] = np.concatenate([np.asarray(s["outcomes"]) for s in sums])[:size]
    count = totals["count"]
    if not count:
        raise DataError(f"none of the {size} test images decodes: check that they are images")
    metrics = {"loss": float(totals["loss"] / count), "accuracy": float(totals["correct"] / count)}
    if "correct_top5" in totals:
        metrics["top5_accuracy"] = float(totals["correct_top5"] / count)
    return metrics | {"count": int(count)}
