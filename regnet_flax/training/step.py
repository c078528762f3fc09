"""One training step and one evaluation step, as pure functions of one device's part of a batch.

They know neither models nor data sets: the loop passes in what makes logits and what makes batches. Reductions over
devices are here alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax

Array = jax.Array
Batch = dict[str, Array]


class TrainState(struct.PyTreeNode):
    """All that training needs to go on, and so all that a checkpoint holds.

    Attributes:
      step: steps taken, int32.
      params: the model's parameters.
      batch_stats: running statistics of batch normalisation.
      opt_state: of the optimiser.
      ema: exponential moving averages of "params" and "batch_stats"; {} where none are kept.
      sums: of loss, accuracy and steps since the last line of the log, so that a resumed run logs what an
        uninterrupted one would have.
      nonfinite_step: the step whose loss or gradient was first not finite, int32, −1 for none; the state is unchanged
        since.
    """

    step: Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any
    sums: dict[str, Array]
    nonfinite_step: Array

    @property
    def variables(self) -> dict[str, Any]:
        """What is evaluated and exported, "params" and "batch_stats": the averages where they are kept."""
        return self.ema or {"params": self.params, "batch_stats": self.batch_stats}


def zero_sums() -> dict[str, Array]:
    """The `sums` of a state from which nothing has been logged yet."""
    return {
        "loss": jnp.zeros((), jnp.float32),
        "accuracy": jnp.zeros((), jnp.float32),
        "steps": jnp.zeros((), jnp.int32),
    }


def create_train_state(variables: dict[str, Any], tx: optax.GradientTransformation, *, ema: bool = False) -> TrainState:
    """The state before the first step, from a model's initial variables; `ema`: averages of them are kept."""
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=tx.init(params),
        # Copies, since a step gives up each array of its state once.
        ema=jax.tree.map(jnp.copy, {"params": params, "batch_stats": batch_stats}) if ema else {},
        sums=zero_sums(),
        nonfinite_step=jnp.full((), -1, jnp.int32),
    )


def cross_entropy(logits: Array, labels: Array, label_smoothing: float = 0.0) -> Array:
    """Softmax cross-entropy of each example, in nats: `torch.nn.functional.cross_entropy` without its mean.

    Args:
      logits: (N, classes).
      labels: int (N,), or float (N, classes), the probability of each class.
      label_smoothing: the share of each target spread evenly over all classes.

    Returns:
      (N,), of the logits' type.
    """
    targets = labels if labels.ndim == 2 else jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, label_smoothing))


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    apply_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    label_smoothing: float = 0.0,
    ema_decay: float = 0.0,
    accumulate_steps: int = 1,
    unroll: bool = False,
    axis_name: str | None = None,
) -> TrainState:
    """One SGD step.

    Args:
      state: the same on all devices.
      batch: "images", normalised, (n, height, width, channels), and "labels", int (n,), or float (n, classes), the
        probability of each class: this device's equal part.
      apply_fn: the model's apply.
      tx: the optimiser.
      label_smoothing: see cross_entropy.
      ema_decay: of the state's averages, where it keeps any.
      accumulate_steps: the batch is taken in so many equal parts, one after another, and their gradients averaged;
        each is normalised by its own statistics.
      unroll: the parts are not a loop, which XLA runs badly on a CPU.
      axis_name: the mapped axis over which gradients, statistics and sums are averaged; None outside pmap.

    Returns:
      The next state; the same state, but for nonfinite_step, if the loss or a gradient is not finite now or was before.
    """

    def mean(tree):
        return lax.pmean(tree, axis_name) if axis_name else tree

    def loss_fn(params, batch_stats, batch):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updates = apply_fn(variables, batch["images"], train=True, mutable=["batch_stats"])
        labels = batch["labels"]
        loss = cross_entropy(logits, labels, label_smoothing).mean()
        likeliest = labels.argmax(-1) if labels.ndim == 2 else labels
        accuracy = (logits.argmax(-1) == likeliest).mean(dtype=jnp.float32)
        return loss, (accuracy, updates.get("batch_stats", {}))

    def gradients(batch_stats, batch):
        (loss, (accuracy, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, batch_stats, batch
        )
        return batch_stats, (grads, loss, accuracy)

    batch_stats, (grads, loss, accuracy) = accumulate(
        gradients, state.batch_stats, batch, steps=accumulate_steps, unroll=unroll
    )
    grads = mean(grads)
    batch_stats = mean(batch_stats)
    loss, accuracy = mean((loss, accuracy))

    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    latest = {"params": params, "batch_stats": batch_stats}
    new = TrainState(
        step=state.step + 1,
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        ema=optax.incremental_update(latest, state.ema, 1 - ema_decay) if state.ema else {},
        sums={
            "loss": state.sums["loss"] + loss,
            "accuracy": state.sums["accuracy"] + accuracy,
            "steps": state.sums["steps"] + 1,
        },
        nonfinite_step=state.nonfinite_step,
    )
    # A gradient can overflow while its loss is finite, and would spoil the parameters one step before the loss shows.
    finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
    stopped = state.nonfinite_step >= 0
    kept = jax.tree.map(lambda a, b: jnp.where(finite & ~stopped, a, b), new, state)
    return kept.replace(nonfinite_step=jnp.where(finite | stopped, state.nonfinite_step, state.step))


def accumulate(
    function: Callable[[Any, Batch], tuple[Any, Any]], carry: Any, batch: Batch, *, steps: int, unroll: bool
):
    """`function` over `steps` equal parts of a batch: the last carry, and the mean of what else it returns."""
    if steps == 1:
        return function(carry, batch)
    parts = jax.tree.map(lambda a: a.reshape(steps, -1, *a.shape[1:]), batch)
    shapes = jax.eval_shape(function, carry, jax.tree.map(lambda a: a[0], parts))[1]

    def add(before, part):
        carry, total = before
        carry, result = function(carry, part)
        return (carry, jax.tree.map(jnp.add, total, result)), None

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    (carry, total), _ = lax.scan(add, (carry, zeros), parts, unroll=unroll)
    return carry, jax.tree.map(lambda a: a / steps, total)


def eval_step(
    variables: dict[str, Any],
    batch: Batch,
    *,
    apply_fn: Callable[..., Any],
    axis_name: str | None = None,
) -> dict[str, Array]:
    """Sums over one batch, from which exact means over a split are made.

    Args:
      variables: "params" and "batch_stats".
      batch: "images", normalised, "labels", int (n,), and "mask", bool (n,), False for padding.
      apply_fn: the model's apply.
      axis_name: the mapped axis over which is summed; None outside pmap.

    Returns:
      "loss", float32; "correct" and "count", int32; "correct_top5" where there are more than five classes; and no sum,
      "outcomes", int32 (N, 2): label and predicted class of each example of all devices' parts, −1 for padding.
    """
    logits = apply_fn(variables, batch["images"], train=False)
    labels, mask = batch["labels"], batch["mask"]
    predicted = logits.argmax(-1).astype(jnp.int32)
    sums = {
        "loss": jnp.where(mask, cross_entropy(logits, labels), 0).sum(),
        "correct": (mask & (predicted == labels)).sum(dtype=jnp.int32),
        "count": mask.sum(dtype=jnp.int32),
    }
    if logits.shape[-1] > 5:
        top5 = lax.top_k(logits, 5)[1]
        sums["correct_top5"] = (mask & (top5 == labels[:, None]).any(-1)).sum(dtype=jnp.int32)
    outcomes = jnp.where(mask[:, None], jnp.stack([labels, predicted], -1), -1)
    if axis_name:
        sums, outcomes = lax.psum(sums, axis_name), lax.all_gather(outcomes, axis_name, tiled=True)
    return sums | {"outcomes": outcomes}
