"""Training and evaluation from a config and a workdir: where everything else is put together."""

from __future__ import annotations

import dataclasses
import functools
import logging
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from regnet_flax import config as config_lib
from regnet_flax.analysis import plots
from regnet_flax.data import augment, in_memory, sources
from regnet_flax.models.registry import create_model
from regnet_flax.training import evaluate, optimizer, steps, workdir
from regnet_flax.training.checkpoint import CHECKPOINTS, Checkpoints
from regnet_flax.training.interrupt import StopSignals, WorkdirError, workdir_lock
from regnet_flax.training.progress import duration
from regnet_flax.training.run import Run, collect_results, report

AXIS = "batch"
STEPS_PER_CALL_ON_ACCELERATORS = 50

logger = logging.getLogger("regnet_flax")


def pmap(function: Callable[..., Any], mapped: Sequence[int | None], devices: list[Any], donate: bool = False):
    """Runs `function` on every device's part; what it returns is the same on all of them.

    The state has no device axis, so checkpoints hold for any number of devices. That the result is the same everywhere
    is not checked: a forgotten mean over devices would pass in silence.
    """
    return jax.pmap(
        function,
        axis_name=AXIS,
        in_axes=tuple(mapped),
        out_axes=None,
        devices=devices,
        donate_argnums=(0,) if donate else (),
    )


def load(config: Any) -> sources.Dataset:
    """The config's data set; says which images could not be read."""
    began = time.monotonic()
    settings = config.dataset
    dataset = sources.load_dataset(
        settings.name,
        data_dir=settings.data_dir,
        image_size=settings.image_size,
        num_classes=settings.num_classes,
        strict=settings.strict,
        seed=config.seed,
    )
    logger.info(
        "%s: %d training and %d test images of %d classes, %s, read in %s",
        dataset.name,
        len(dataset.train.labels),
        len(dataset.test.labels),
        len(dataset.class_names),
        "×".join(map(str, dataset.train.images.shape[1:])),
        duration(time.monotonic() - began),
    )
    for skipped in dataset.skipped:
        logger.warning("left out %s", skipped)
    return dataset


class Program:
    """The compiled functions of a run, and the data on its devices.

    Args:
      config: resolved.
      dataset: what `load` gave.
      devices: over which each batch is divided.

    Attributes:
      steps_per_epoch: whole batches in the training split.
      total_steps: of the run, which `train.max_steps` may cut short.
      steps_per_call: the most steps of one compiled call.
      schedule: learning rate by step.
      drops: the epochs at which the step schedule lowers it.
      like: shapes, dtypes and placement of the state.
    """

    def __init__(self, config: Any, dataset: sources.Dataset, devices: list[Any]):
        self._config, self._devices = config, devices
        mesh = Mesh(np.array(devices), (AXIS,))
        self._replicated = NamedSharding(mesh, PartitionSpec())
        # Put on all devices once: an argument left on one of them would be copied at every call.
        self._place = functools.partial(jax.device_put, device=self._replicated)
        self._train_data = self._place(dataclasses.asdict(dataset.train))
        self._test_data = self._place(dataclasses.asdict(dataset.test))
        self._shards = jax.device_put(np.arange(len(devices)), NamedSharding(mesh, PartitionSpec(AXIS)))
        self._seed = self._place(np.int32(config.seed))

        train, settings = config.train, config.optimizer
        self._size, self._test_size = len(dataset.train.labels), len(dataset.test.labels)
        self.steps_per_epoch = self._size // train.batch_size
        self.total_steps = train.epochs * self.steps_per_epoch
        if train.max_steps:
            self.total_steps = min(self.total_steps, train.max_steps)
        on_cpu = devices[0].platform == "cpu"
        self.steps_per_call = train.steps_per_call or (1 if on_cpu else STEPS_PER_CALL_ON_ACCELERATORS)
        self.schedule = optimizer.make_schedule(
            settings.schedule,
            settings.learning_rate,
            epochs=train.epochs,
            steps_per_epoch=self.steps_per_epoch,
            boundaries=settings.boundaries,
            decay=settings.decay,
            warmup_epochs=settings.warmup_epochs,
        )
        drops = optimizer.boundary_steps(settings.boundaries, train.epochs, self.steps_per_epoch)
        self.drops = [step / self.steps_per_epoch for step in drops] if settings.schedule == "step" else []
        self._tx = optimizer.make_optimizer(
            self.schedule,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
            weight_decay=settings.weight_decay,
            clip_norm=settings.clip_norm,
        )
        make_model = functools.partial(
            create_model,
            config.model.name,
            num_classes=config.dataset.num_classes,
            dtype=jnp.dtype(config.dtype),
            **config_lib.model_options(config),
        )
        self._model = make_model(axis_name=AXIS if train.batch_norm == "sync" else None)
        self._image_shape = dataset.train.images.shape[1:]
        self.like = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=self._replicated),
            jax.eval_shape(self._initial_state),
        )
        self._order: tuple[int, jax.Array] = (-1, self._seed)
        self._p_train = pmap(self._train_steps, (None, 0, None, None, None, None), devices, donate=True)
        self._p_eval = pmap(self._eval_step, (None, 0, None, None), devices)

    def _initial_state(self) -> steps.TrainState:
        images = jnp.zeros((1, *self._image_shape))
        variables = self._model.init(jax.random.key(self._config.seed), images, train=False)
        return steps.create_train_state(dict(variables), self._tx)

    def initial_state(self) -> steps.TrainState:
        """The state before the first step."""
        return self._place(jax.jit(self._initial_state)())

    def _normalize(self, images: jax.Array) -> jax.Array:
        return augment.normalize(images, self._config.dataset.mean, self._config.dataset.std)

    def _train_steps(self, state, shard, data, order, seed, count):
        def one(_, state):
            batch, keys = in_memory.train_batch(
                data,
                order,
                seed,
                state.step,
                batch_size=self._config.train.batch_size,
                shard=shard,
                shards=len(self._devices),
            )
            images = augment.augment(self._config.dataset.augment, keys, batch["images"])
            return steps.train_step(
                state,
                {"images": self._normalize(images), "labels": batch["labels"]},
                apply_fn=self._model.apply,
                tx=self._tx,
                label_smoothing=self._config.optimizer.label_smoothing,
                axis_name=AXIS,
            )

        state = one(0, state) if self.steps_per_call == 1 else jax.lax.fori_loop(0, count, one, state)
        return state, state.step

    def train(self, state: steps.TrainState, step: int, count: int) -> tuple[steps.TrainState, jax.Array]:
        """Takes `count` steps of one epoch from `step`; the state given is used up.

        Returns:
          The next state, and an array that is ready when it is, and that the next call does not use up.
        """
        epoch = step // self.steps_per_epoch
        if self._order[0] != epoch:
            self._order = epoch, self._place(in_memory.epoch_order(self._config.seed, epoch, self._size))
        return self._p_train(state, self._shards, self._train_data, self._order[1], self._seed, count)

    def _eval_step(self, variables, shard, data, start):
        batch = in_memory.eval_batch(
            data, start, batch_size=self._eval_batch_size, shard=shard, shards=len(self._devices)
        )
        batch["images"] = self._normalize(batch["images"])
        return steps.eval_step(variables, batch, apply_fn=self._model.apply, axis_name=AXIS)

    @property
    def _eval_batch_size(self) -> int:
        devices = len(self._devices)
        return -(-min(self._config.eval.batch_size, self._test_size) // devices) * devices

    def evaluate(self, state: steps.TrainState, poll: Callable[[int], None] = lambda done: None) -> dict[str, float]:
        """Metrics of the test split; see evaluate.evaluate."""
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        return evaluate.evaluate(
            lambda start: self._p_eval(variables, self._shards, self._test_data, start),
            self._test_size,
            self._eval_batch_size,
            poll,
        )


def train_and_evaluate(config: Any, path: str | pathlib.Path, devices: list[Any] | None = None) -> dict[str, Any]:
    """Trains, or goes on with, the run of a workdir.

    Args:
      config: a nested config with the fields of configs/base.py.
      path: the workdir. A run that it holds is gone on with; a finished one is only reported.
      devices: to train on; all local ones by default.

    Returns:
      What results.json holds.

    Raises:
      ConfigError: wrong values, or others than those the workdir's run began with.
      DataError: the data set is missing or unreadable.
      WorkdirError: the workdir cannot be used.
      CheckpointError: the workdir has checkpoints, and none can be read.
      NonFiniteError: the loss or a gradient is not finite.
      Interrupted: stopped by a signal, after saving.
    """
    path, devices = pathlib.Path(path), devices or jax.local_devices()
    config_lib.check_config(config, len(devices))
    stored = workdir.read_json(path / workdir.CONFIG)
    _refuse_changes(stored, config, path, resolved=False)
    results = workdir.read_json(path / workdir.RESULTS)
    if stored and results and stored["train"]["max_steps"] == config.train.max_steps:
        logger.info("%s holds a finished run", path)
        report(results, path)
        return results

    with StopSignals() as stop:
        dataset = load(config)
        fingerprint = dataset.fingerprint()
        if stored and stored["dataset_fingerprint"] != fingerprint:
            raise config_lib.ConfigError(
                f"{path} was trained on other images than {dataset.name} has now: restore them, or name another workdir"
            )
        config = config_lib.resolve(config, dataset)
        _refuse_changes(stored, config, path, resolved=True)
        with workdir_lock(path):
            record = {"class_names": list(dataset.class_names), "dataset_fingerprint": fingerprint}
            workdir.write_json(path / workdir.CONFIG, workdir.plain(config) | record)
            handler = workdir.log_to(path)
            checkpoints = Checkpoints(path, config.checkpoint.keep, config.checkpoint.keep_best)
            try:
                logger.info(
                    "%s on %d × %s, %s; the first step takes longer, since it is compiled",
                    config.model.name,
                    len(devices),
                    devices[0].device_kind,
                    config.dtype,
                )
                program = Program(config, dataset, devices)
                run = Run(config, path, program, checkpoints, stop)
                run.run()
                checkpoints.wait()
                results = collect_results(run, config, path, devices)
                (path / workdir.FIGURES).mkdir(exist_ok=True)
                plots.curves(
                    workdir.read_metrics(path),
                    path / workdir.FIGURES / "curves.png",
                    title=f"{config.model.name} on {dataset.name}",
                    drops=program.drops,
                )
                # Last, since it is what marks the run as finished.
                workdir.write_json(path / workdir.RESULTS, results)
                report(results, path)
            finally:
                checkpoints.close()
                workdir.stop_logging(handler)
    return results


def _refuse_changes(stored: dict[str, Any] | None, config: Any, path: pathlib.Path, *, resolved: bool) -> None:
    if stored and (lines := config_lib.changed_fields(stored, workdir.plain(config), resolved=resolved)):
        raise config_lib.ConfigError(
            f"{path} holds a run with another config ({'; '.join(lines)}): name another --workdir, or undo the change"
        )


def evaluate_only(config: Any, path: str | pathlib.Path, devices: list[Any] | None = None) -> dict[str, float]:
    """Evaluates the checkpoint `eval.checkpoint` of a workdir on the test split.

    Args:
      config: the workdir's, its values to be overridden at will.
      path: the workdir.
      devices: to evaluate on; all local ones by default.

    Returns:
      "step", "loss", "accuracy", "top5_accuracy" where there are more than five classes, and "count".

    Raises:
      ConfigError, DataError, CheckpointError: see train_and_evaluate.
    """
    path, devices = pathlib.Path(path), devices or jax.local_devices()
    config_lib.check_config(config, len(devices))
    if not (path / CHECKPOINTS).is_dir():
        raise WorkdirError(f"there is no checkpoint in {path}: train first, or name the run with --workdir")
    dataset = load(config)
    program = Program(config_lib.resolve(config, dataset), dataset, devices)
    checkpoints = Checkpoints(path, config.checkpoint.keep, config.checkpoint.keep_best)
    try:
        step, state = checkpoints.read(str(config.eval.checkpoint), program.like)
    finally:
        checkpoints.close()
    metrics = {"step": step} | program.evaluate(state)
    top5 = f", top-5 {metrics['top5_accuracy']:.2%}" if "top5_accuracy" in metrics else ""
    logger.info(
        "step %d: test loss %.4f, accuracy %.2f %%%s, over %d images",
        step,
        metrics["loss"],
        100 * metrics["accuracy"],
        top5,
        metrics["count"],
    )
    return metrics
