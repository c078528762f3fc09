"""Builds the training step of a config, its plan and its trainer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from regnet_flax.data import augment, mix, stream
from regnet_flax.data.feeds import make_feed
from regnet_flax.modes.setup.datasets import Dataset
from regnet_flax.modes.setup.models import build_model
from regnet_flax.training import optimizer
from regnet_flax.training.parallel import AXIS, Placement
from regnet_flax.training.run import Plan
from regnet_flax.training.step import create_train_state, eval_step, train_step
from regnet_flax.training.trainer import Step, Trainer

STEPS_PER_CALL_ON_ACCELERATORS = 50


def build_step(
    config: Any, model: nn.Module, tx: optax.GradientTransformation, image_shape: Sequence[int], unroll: bool
) -> Step:
    """Makes the Step of a resolved config, for images of shape (height, width, channels).

    Args:
      unroll: whether to unroll the loop over a batch's parts, which XLA runs slowly on a CPU.
    """
    train, settings, data = config.train, config.optimizer, config.dataset
    names = tuple(name for name in data.augment if name != stream.CROP)  # the host crops while it decodes

    def init(seed):
        variables = model.init(jax.random.key(seed), jnp.zeros((1, *image_shape)), train=False)
        return create_train_state(dict(variables), tx, ema=settings.ema_decay > 0)

    def normalize(images):
        return augment.normalize(images, data.mean, data.std)

    def train_one(state, batch, keys, seed, step):
        images, labels = augment.prepare(names, keys, batch["images"], data.mean, data.std), batch["labels"]
        if train.mixup or train.cutmix:
            alphas = {"mixup_alpha": train.mixup, "cutmix_alpha": train.cutmix}
            images, labels = mix.mix(seed, step, images, labels, classes=data.num_classes, **alphas)
        return train_step(
            state,
            {"images": images, "labels": labels},
            apply_fn=model.apply,
            tx=tx,
            label_smoothing=settings.label_smoothing,
            ema_decay=settings.ema_decay,
            accumulate_steps=settings.accumulate_steps,
            unroll=unroll,
            axis_name=AXIS,
        )

    def evaluate(variables, batch):
        batch = batch | {"images": normalize(batch["images"])}
        return eval_step(variables, batch, apply_fn=model.apply, axis_name=AXIS)

    return Step(init, train_one, evaluate, settings.accumulate_steps)


def make_plan(config: Any, train_size: int) -> Plan:
    """Makes the Plan of a resolved config for `train_size` training examples."""
    train, settings = config.train, config.optimizer
    steps_per_epoch = max(1, train_size // train.batch_size)  # there may be no whole batch in evaluation
    total_steps = min(train.epochs * steps_per_epoch, train.max_steps or sys.maxsize)
    drops = optimizer.boundary_steps(settings.boundaries, train.epochs, steps_per_epoch)
    schedule, _ = optimizer.build_optimizer(config, steps_per_epoch)
    drops = tuple(step / steps_per_epoch for step in drops) if settings.schedule == "step" else ()
    return Plan(steps_per_epoch, total_steps, schedule, drops)


def make_trainer(
    config: Any,
    dataset: Dataset,
    devices: Sequence[Any],
    seeds: Sequence[int] = (),
    start: dict[str, Any] | None = None,
) -> Trainer:
    """Makes the trainer of a resolved config.

    Args:
      config: the resolved config.
      dataset: in memory, or streamed.
      devices: the devices that share each batch.
      seeds: the runs' seeds; by default the config's.
      start: see Trainer.
    """
    train, data, seeds = config.train, config.dataset, tuple(seeds) or (config.seed,)
    on_cpu = devices[0].platform == "cpu"
    plan = make_plan(config, dataset.size("train"))
    model = build_model(config, devices, AXIS if train.batch_norm == "sync" else None)
    _, tx = optimizer.build_optimizer(config, plan.steps_per_epoch)
    step, placement = build_step(config, model, tx, dataset.image_shape, unroll=on_cpu), Placement(devices)
    feed = make_feed(
        dataset,
        seeds,
        placement,
        batch_size=train.batch_size,
        parts=step.parts,
        total_steps=plan.total_steps,
        workers=data.workers,
        prefetch=data.prefetch,
    )
    steps_per_call = train.steps_per_call or (1 if on_cpu else STEPS_PER_CALL_ON_ACCELERATORS)
    # vmap over weights makes grouped convolutions, which XLA:CPU runs slowly.
    together = config.compare.together == "always" or (config.compare.together == "auto" and not on_cpu)
    return Trainer(step, feed, seeds, placement, steps_per_call=steps_per_call, together=together, start=start)
