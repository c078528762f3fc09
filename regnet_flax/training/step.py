"""One training step and one evaluation step, as pure functions of one device's part of a batch.

They know neither models nor data sets: the trainer passes in the functions that make logits and batches. Only this
module reduces over devices. A training metric is one line in `train_step`: it is logged as "train_<name>", its mean
over the steps since the last line of the log.
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
    """Everything that training needs to continue.

    Attributes:
      step: steps taken, int32.
      params: the model's parameters.
      batch_stats: running statistics of batch normalisation.
      opt_state: the optimiser's state.
      ema: exponential moving averages of "params" and "batch_stats"; {} if none are kept.
      nonfinite_step: the first step whose loss or gradient was not finite, int32, −1 for none; from then on the state
        does not change.
    """

    step: Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any
    nonfinite_step: Array

    @property
    def variables(self) -> dict[str, Any]:
        """The variables to evaluate and export, "params" and "batch_stats": the averages if they are kept."""
        return self.ema or {"params": self.params, "batch_stats": self.batch_stats}


def create_train_state(variables: dict[str, Any], tx: optax.GradientTransformation, *, ema: bool = False) -> TrainState:
    """Makes the state before the first step from a model's initial variables; `ema`: whether to keep averages."""
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=tx.init(params),
        # Copies, because a step can donate each array of its state only once.
        ema=jax.tree.map(jnp.copy, {"params": params, "batch_stats": batch_stats}) if ema else {},
        nonfinite_step=jnp.full((), -1, jnp.int32),
    )


def cross_entropy(logits: Array, labels: Array, label_smoothing: float = 0.0) -> Array:
    """Computes each example's softmax cross-entropy in nats: `torch.nn.functional.cross_entropy` without its mean.

    Args:
      logits: (N, classes).
      labels: int (N,), or float (N, classes), the probability of each class.
      label_smoothing: the share of each target spread evenly over all classes.

    Returns:
      (N,), with the logits' dtype.
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
) -> tuple[TrainState, Batch]:
    """Takes one step of the optimiser.

    Args:
      state: the same on all devices.
      batch: this device's equal part: "images", normalised, (n, height, width, channels), and "labels", int (n,), or
        float (n, classes), the probability of each class.
      apply_fn: the model's apply.
      tx: the optimiser.
      label_smoothing: see cross_entropy.
      ema_decay: the decay of the state's averages, if it keeps any. After t steps it is min(ema_decay,
        (1 + t) / (10 + t)), so the random initial values soon fade (tf.train.ExponentialMovingAverage's num_updates).
      accumulate_steps: the number of equal parts into which the batch is divided; they run one after another, and
        their gradients are averaged. Batch normalisation uses each part's own statistics.
      unroll: whether to unroll the loop over the parts, which XLA runs slowly on a CPU.
      axis_name: the mapped axis over which gradients, statistics and sums are averaged; None outside pmap.

    Returns:
      The next state; if the loss or a gradient is or was not finite, the same state except for nonfinite_step. And the
      step's metrics, float32 scalars by name.
    """

    def mean(tree):
        return lax.pmean(tree, axis_name) if axis_name else tree

    def loss_fn(params, batch_stats, batch):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updates = apply_fn(variables, batch["images"], train=True, mutable=["batch_stats"])
        labels = batch["labels"]
        loss = cross_entropy(logits, labels, label_smoothing).mean()
        likeliest = labels.argmax(-1) if labels.ndim == 2 else labels
        metrics = {
            "loss": loss,
            "accuracy": (logits.argmax(-1) == likeliest).mean(dtype=jnp.float32),
        }
        return loss, (metrics, updates.get("batch_stats", {}))

    def gradients(batch_stats, batch):
        (_, (metrics, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch_stats, batch)
        return batch_stats, (grads, metrics)

    batch_stats, (grads, metrics) = accumulate(
        gradients, state.batch_stats, batch, steps=accumulate_steps, unroll=unroll
    )
    grads = mean(grads)
    batch_stats = mean(batch_stats)
    metrics = mean(metrics)

    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    latest = {"params": params, "batch_stats": batch_stats}
    decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
    new = TrainState(
        step=state.step + 1,
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        ema=optax.incremental_update(latest, state.ema, 1 - decay) if state.ema else {},
        nonfinite_step=state.nonfinite_step,
    )
    # A gradient can overflow while the loss is finite, and would ruin the parameters one step before the loss shows it.
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(optax.tree.norm(grads))
    stopped = state.nonfinite_step >= 0
    kept = jax.tree.map(lambda a, b: jnp.where(finite & ~stopped, a, b), new, state)
    kept = kept.replace(nonfinite_step=jnp.where(finite | stopped, state.nonfinite_step, state.step))
    return kept, metrics


def add_metrics(totals: Batch | None, metrics: Batch) -> Batch:
    """Sums metrics over steps, one step at a time, so that the sum depends only on the steps.

    Args:
      totals: the sums so far, by name; None for no step yet. A metric without a sum is ignored until the sums restart.
      metrics: (…, steps), the metrics of further steps.

    Returns:
      (…) by name, with the metrics' dtypes.
    """

    def add(name: str, values: Array) -> Array:
        total = jnp.broadcast_to(jnp.asarray(totals[name] if totals else 0, values.dtype), values.shape[:-1])
        if values.shape[-1] == 1:
            return total + values[..., 0]
        return lax.fori_loop(0, values.shape[-1], lambda i, sum: sum + values[..., i], total)

    return {name: add(name, values) for name, values in metrics.items() if not totals or name in totals}


def accumulate(
    function: Callable[[Any, Batch], tuple[Any, Any]], carry: Any, batch: Batch, *, steps: int, unroll: bool
):
    """Applies `function` to `steps` equal parts of a batch; returns the last carry and the mean of the other result."""
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
    """Computes sums over one batch, from which exact means over a split follow.

    Args:
      variables: "params" and "batch_stats".
      batch: "images", normalised, "labels", int (n,), and "mask", bool (n,), False for padding.
      apply_fn: the model's apply.
      axis_name: the mapped axis to sum over; None outside pmap.

    Returns:
      "loss", float32; "correct" and "count", int32; "correct_top5" if there are more than five classes. And, not a sum,
      "outcomes", int32 (N, 3): the label, the predicted class and its probability in millionths for each example of
      all devices' parts; −1 for padding.
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
    certainty = jnp.round(1e6 * jax.nn.softmax(logits).max(-1)).astype(jnp.int32)
    outcomes = jnp.where(mask[:, None], jnp.stack([labels, predicted, certainty], -1), -1)
    if axis_name:
        sums, outcomes = lax.psum(sums, axis_name), lax.all_gather(outcomes, axis_name, tiled=True)
    return sums | {"outcomes": outcomes}
