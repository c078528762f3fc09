"""Learning-rate schedules and optimisers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from regnet_flax.config.fields import OPTIMIZERS, SCHEDULES, boundary_steps

Schedule = Callable[[Any], Any]  # maps the steps taken to a float32 scalar


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
    """Makes the learning rate as a function of the steps taken so far.

    Args:
      kind: "step": multiplied by `decay` at each boundary; "cosine": falls from the end of the warm-up to 0 at the end
        of the run; "constant".
      learning_rate: the rate after the warm-up.
      epochs: length of the run.
      steps_per_epoch: batches per epoch.
      boundaries: for "step", in epochs, or below 1 as fractions of the run.
      decay: the factor at each boundary.
      warmup_epochs: during the warm-up the rate is learning_rate × (step + 1) / (steps of the warm-up).

    Returns:
      A function from a step to a float32 scalar.

    Raises:
      ValueError: the kind is unknown.
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
    name: str,
    schedule: Schedule,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    betas: Sequence[float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    decayed: str = "all",
    clip_norm: float = 0.0,
) -> optax.GradientTransformation:
    """Makes an optimiser by name.

    Args:
      name: "sgd": `torch.optim.SGD`, whose weight decay is L2, added to the gradient before the momentum. "adamw":
        `torch.optim.AdamW` (arXiv 1711.05101). "lamb": arXiv 1904.00962, where each block of a stage is a separate
        layer. For these two, the weight decay times the learning rate is added to the update.
      schedule: learning rate by step.
      momentum: for "sgd"; 0 for none.
      nesterov: whether to use Nesterov momentum, for "sgd".
      betas: decay rates of the averages of the gradient and its square, for "adamw" and "lamb".
      weight_decay: the coefficient of weight decay.
      decayed: which parameters decay: "all", "kernels" (neither biases nor a batch normalisation's scale), or
        "outside_regulators" (all but the weights of the ConvRNN, ConvGRU or ConvLSTM).
      clip_norm: the gradient's largest global norm, before weight decay; 0 for no limit.

    Raises:
      ValueError: the name is unknown.
    """
    parts = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    mask = {"all": None, "kernels": kernels, "outside_regulators": outside_regulators}[decayed]
    if name == "sgd":
        if weight_decay:
            parts.append(optax.add_decayed_weights(weight_decay, mask))
        parts.append(optax.sgd(schedule, momentum=momentum or None, nesterov=nesterov))
    elif name == "adamw":
        parts.append(optax.adamw(schedule, *betas, eps=1e-8, weight_decay=weight_decay, mask=mask))
    elif name == "lamb":
        parts.append(optax.scale_by_adam(*betas, eps=1e-6))
        parts.append(optax.add_decayed_weights(weight_decay, mask))
        parts += [optax.stateless(_by_trust_ratio), optax.scale_by_learning_rate(schedule)]
    else:
        raise ValueError(f"unknown optimiser {name!r}: it must be one of {', '.join(OPTIMIZERS)}")
    return optax.chain(*parts)


def _by_trust_ratio(updates: Any, params: Any) -> Any:
    """Scales each layer's update by ‖parameters‖ / ‖update‖, as LAMB does; `nn.scan` stacks the layers of "blocks"."""

    def scale(path: Any, update: Any, parameter: Any) -> Any:
        stacked = any(getattr(key, "key", "") == "blocks" for key in path)
        axes = tuple(range(int(stacked), parameter.ndim))
        norm, size = (jnp.sqrt(jnp.square(a).sum(axes, keepdims=True)) for a in (parameter, update))
        return update * jnp.where((norm > 0) & (size > 0), norm / jnp.where(size > 0, size, 1), 1)

    return jax.tree_util.tree_map_with_path(scale, updates, params)


def kernels(params: Any) -> Any:
    """Returns a tree like `params`, True for kernels: found by name, because stacked biases have two axes too."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: path[-1].key not in ("bias", "scale"), params)


def outside_regulators(params: Any) -> Any:
    """Returns a tree like `params`, False for the weights of regulators."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: all(key.key != "regulator" for key in path), params)


def build_optimizer(config: Any, steps_per_epoch: int) -> tuple[Schedule, optax.GradientTransformation]:
    """Returns a config's learning rate by step, and its optimiser."""
    settings = config.optimizer
    schedule = make_schedule(
        settings.schedule,
        settings.learning_rate,
        epochs=config.train.epochs,
        steps_per_epoch=steps_per_epoch,
        boundaries=settings.boundaries,
        decay=settings.decay,
        warmup_epochs=settings.warmup_epochs,
    )
    return schedule, make_optimizer(
        settings.name,
        schedule,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        decayed=settings.decayed,
        clip_norm=settings.clip_norm,
    )


def changed_rate(config: Any, epochs_before: int, steps_per_epoch: int, step: int) -> str:
    """Describes the first learning rate of the first `step` steps that a change of `train.epochs` from `epochs_before`
    would alter; "" if there is none.
    """
    before = copy.deepcopy(config)
    before.train.epochs = epochs_before
    taken = np.arange(min(step, epochs_before * steps_per_epoch))
    old, new = (np.broadcast_to(build_optimizer(c, steps_per_epoch)[0](taken), taken.shape) for c in (before, config))
    different = np.flatnonzero(old != new)
    if not different.size:
        return ""
    first = different[0]
    return f"the learning rate of step {first + 1} was {old[first]:.6g} and would be {new[first]:.6g}"
