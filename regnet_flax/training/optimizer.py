"""Learning-rate schedules and SGD."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import optax

from regnet_flax.config.fields import SCHEDULES, boundary_steps

Schedule = Callable[[Any], Any]  # from steps taken to a float32 scalar


def make_schedule(
    kind: str,
    learning_rate: float,
    *,
    epochs: float,
    steps_per_epoch: int,
    boundaries: Sequence[float] = (),
    decay: float = 0.1,
    warmup_epochs: float = 0.0,
) -> Schedule:
    """The learning rate as a function of the steps taken so far.

    Args:
      kind: "step": multiplied by `decay` at each boundary; "cosine": from the end of the warm-up down to 0 at the end
        of the run; "constant".
      learning_rate: after the warm-up.
      epochs: length of the run.
      steps_per_epoch: batches an epoch.
      boundaries: of "step", in epochs, or below 1 as fractions of the run.
      decay: factor at each boundary.
      warmup_epochs: the first steps take learning_rate × (step + 1) / (steps of the warm-up).

    Returns:
      From a step to a float32 scalar.

    Raises:
      ValueError: unknown kind.
    """
    total, warmup = round(epochs * steps_per_epoch), round(warmup_epochs * steps_per_epoch)
    if kind == "step":
        steps = boundary_steps(boundaries, epochs, steps_per_epoch)
        factors = {step: decay ** steps.count(step) for step in steps}
        base: Schedule = optax.piecewise_constant_schedule(learning_rate, factors)
    elif kind == "cosine":
        decayed = optax.cosine_decay_schedule(learning_rate, max(1, total - warmup))
        base = lambda count: decayed(jnp.maximum(count - warmup, 0))  # noqa: E731
    elif kind == "constant":
        base = optax.constant_schedule(learning_rate)
    else:
        raise ValueError(f"unknown schedule {kind!r}: it must be one of {', '.join(SCHEDULES)}")

    def schedule(count):
        rate = jnp.asarray(base(count), jnp.float32)
        return rate * jnp.minimum(1.0, (count + 1) / warmup) if warmup else rate

    return schedule


def make_optimizer(
    schedule: Schedule,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    clip_norm: float = 0.0,
) -> optax.GradientTransformation:
    """`torch.optim.SGD`: weight decay is L2, on all weights, added to the gradient before the momentum.

    Args:
      schedule: learning rate by step.
      momentum: 0 for none.
      nesterov: Nesterov's form of momentum.
      weight_decay: coefficient of L2.
      clip_norm: the gradient's largest global norm, before weight decay; 0 for no bound.
    """
    parts = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    if weight_decay:
        parts.append(optax.add_decayed_weights(weight_decay))
    parts.append(optax.sgd(schedule, momentum=momentum or None, nesterov=nesterov))
    return optax.chain(*parts)
