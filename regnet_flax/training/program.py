"""The compiled functions of a run: model, optimiser, training steps and evaluation over devices."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from regnet_flax.config import model_options
from regnet_flax.data import augment, in_memory, mix
from regnet_flax.data.sources import Dataset
from regnet_flax.data.streaming import StreamedDataset
from regnet_flax.models.registry import create_model
from regnet_flax.training import evaluate, optimizer, steps

AXIS = "batch"
STEPS_PER_CALL_ON_ACCELERATORS = 50


def build_model(config: Any, axis_name: str | None = None, devices: list[Any] | None = None) -> nn.Module:
    """The model of a resolved config, for `devices`; None is JAX's default device."""
    return create_model(
        config.model.name,
        num_classes=config.dataset.num_classes,
        dtype=jnp.dtype(config.dtype),
        axis_name=axis_name,
        devices=devices,
        **model_options(config),
    )


def build_optimizer(config: Any, steps_per_epoch: int) -> tuple[optimizer.Schedule, optax.GradientTransformation]:
    """The learning rate by step, and SGD, of a config."""
    settings = config.optimizer
    schedule = optimizer.make_schedule(
        settings.schedule,
        settings.learning_rate,
        epochs=config.train.epochs,
        steps_per_epoch=steps_per_epoch,
        boundaries=settings.boundaries,
        decay=settings.decay,
        warmup_epochs=settings.warmup_epochs,
    )
    return schedule, optimizer.make_optimizer(
        schedule,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
    )


def changed_rate(config: Any, epochs_before: int, steps_per_epoch: int, step: int) -> str:
    """Which learning rate of the first `step` steps `train.epochs` changes, "" if none, once it was `epochs_before`."""
    before = copy.deepcopy(config)
    before.train.epochs = epochs_before
    taken = np.arange(min(step, epochs_before * steps_per_epoch))
    old, new = (np.broadcast_to(build_optimizer(c, steps_per_epoch)[0](taken), taken.shape) for c in (before, config))
    different = np.flatnonzero(old != new)
    if not different.size:
        return ""
    first = different[0]
    return f"the learning rate of step {first + 1} was {old[first]:.6g} and would be {new[first]:.6g}"


def build_state(
    model: nn.Module,
    tx: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    seed: jax.Array | int,
    ema: bool = False,
) -> steps.TrainState:
    """The state before the first step, for images of shape (height, width, channels)."""
    variables = model.init(jax.random.key(seed), jnp.zeros((1, *image_shape)), train=False)
    return steps.create_train_state(dict(variables), tx, ema=ema)


def put(tree: Any, sharding: NamedSharding) -> Any:
    """A tree of arrays, the same on every process, as arrays of this sharding."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    # device_put would first compare what all processes give, the whole data set too.
    def put_global(array: Any) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put_global, tree)


class Program:
    """The compiled functions of a run, and the data on its devices.

    Args:
      config: resolved.
      dataset: the data set.
      devices: over which each batch is divided.
      parallelize: loop.pmap, or what takes its place.
      start: variables that take the place of initial ones; the head may be left out.

    Attributes:
      devices: as given.
      model: of the config.
      seeds: of the run, one.
      steps_per_epoch: whole batches in the training split.
      total_steps: of the run, which `train.max_steps` may cut short.
      steps_per_call: the most steps of one compiled call.
      schedule: learning rate by step.
      drops: the epochs at which the step schedule lowers it.
      like: shapes, dtypes and placement of the state.
    """

    def __init__(
        self,
        config: Any,
        dataset: Dataset | StreamedDataset,
        devices: list[Any],
        parallelize: Callable[..., Any],
        start: dict[str, Any] | None = None,
    ):
        self._config, self.devices, self._start = config, devices, start
        self.seeds: tuple[int, ...] = (config.seed,)
        mesh = Mesh(np.array(devices), (AXIS,))
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._divided = NamedSharding(mesh, PartitionSpec(AXIS))
        self._place_data(dataset)
        self._shards = put(np.arange(len(devices)), self._divided)
        self._seed = self.place(np.int32(config.seed))

        train, settings = config.train, config.optimizer
        self._size, self._test_size = dataset.train_size, dataset.test_size
        self.steps_per_epoch = max(1, self._size // train.batch_size)  # evaluation needs no whole batch
        self.total_steps = train.epochs * self.steps_per_epoch
        if train.max_steps:
            self.total_steps = min(self.total_steps, train.max_steps)
        on_cpu = devices[0].platform == "cpu"
        self.steps_per_call = train.steps_per_call or (1 if on_cpu else STEPS_PER_CALL_ON_ACCELERATORS)
        self.schedule, self._tx = build_optimizer(config, self.steps_per_epoch)
        drops = optimizer.boundary_steps(settings.boundaries, train.epochs, self.steps_per_epoch)
        self.drops = [step / self.steps_per_epoch for step in drops] if settings.schedule == "step" else []
        self.model = build_model(config, AXIS if train.batch_norm == "sync" else None, devices)
        self._image_shape = dataset.image_shape
        self.like = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=self._replicated),
            jax.eval_shape(self._initial_state, np.int32(config.seed)),
        )
        self._order: tuple[int, jax.Array] = (-1, self._seed)
        self._compile(functools.partial(parallelize, devices=devices))

    def _place_data(self, dataset: Any) -> None:
        self._train_data = self.place(dataclasses.asdict(dataset.train))
        self._test_data = self.place(dataclasses.asdict(dataset.test))

    def _compile(self, parallelize: Callable[..., Any]) -> None:
        self._p_train = parallelize(self._train_steps, (None, 0, None, None, None, None), donate=True)
        self._p_eval = parallelize(self._eval_step, (None, 0, None, None))

    def _initial_state(self, seed: jax.Array) -> steps.TrainState:
        ema = self._config.optimizer.ema_decay > 0
        return build_state(self.model, self._tx, self._image_shape, seed, ema)

    def initial_state(self) -> steps.TrainState:
        """The state before the first step."""
        return self.place(self._first_state(jax.jit(self._initial_state), np.int32(self._config.seed)))

    def _first_state(self, initial_state: Callable[[Any], steps.TrainState], seed: Any) -> steps.TrainState:
        state = initial_state(seed)
        if self._start is not None:
            state = state.replace(
                params=state.params | self._start["params"], batch_stats=state.batch_stats | self._start["batch_stats"]
            )
            if state.ema:
                latest = {"params": state.params, "batch_stats": state.batch_stats}
                state = state.replace(ema=jax.tree.map(jnp.copy, latest))
        # Machines of different make may differ in the last bit, and would stay apart.
        return state if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(state)

    def zero_sums(self) -> dict[str, jax.Array]:
        """The `sums` of a state from which nothing has been logged yet."""
        return self.place(jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), self.like.sums))

    def place(self, tree: Any) -> Any:
        """A tree of arrays on every device, where an argument left on one of them would be copied at every call."""
        return put(tree, self._replicated)

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
                shards=len(self.devices),
                parts=self._config.optimizer.accumulate_steps,
            )
            return self._train_step(state, batch, keys, self._config.dataset.augment, seed)

        state = one(0, state) if self.steps_per_call == 1 else jax.lax.fori_loop(0, count, one, state)
        return state, state.step

    def _train_step(self, state, batch, keys, names, seed):
        train, settings = self._config.train, self._config.optimizer
        images = self._normalize(augment.augment(names, keys, batch["images"]))
        labels = batch["labels"]
        if train.mixup or train.cutmix:
            alphas = {"mixup_alpha": train.mixup, "cutmix_alpha": train.cutmix}
            classes = self._config.dataset.num_classes
            images, labels = mix.mix(seed, state.step, images, labels, classes=classes, **alphas)
        return steps.train_step(
            state,
            {"images": images, "labels": labels},
            apply_fn=self.model.apply,
            tx=self._tx,
            label_smoothing=settings.label_smoothing,
            ema_decay=settings.ema_decay,
            accumulate_steps=settings.accumulate_steps,
            unroll=self.devices[0].platform == "cpu",
            axis_name=AXIS,
        )

    def lower_training(self, state: steps.TrainState) -> Any:
        """The training step lowered, as by jax.jit: compiled, it tells the memory that it takes."""
        order = self.place(in_memory.epoch_order(self._config.seed, 0, self._size))
        return self._p_train.lower(state, self._shards, self._train_data, order, self._seed, self.steps_per_call)

    def train(self, state: steps.TrainState, step: int, count: int) -> tuple[steps.TrainState, jax.Array]:
        """Takes `count` steps of one epoch from `step`; the state given is used up.

        Returns:
          The next state, and an array that is ready when it is, and that the next call does not use up.
        """
        epoch = step // self.steps_per_epoch
        if self._order[0] != epoch:
            self._order = epoch, self.place(in_memory.epoch_order(self._config.seed, epoch, self._size))
        return self._p_train(state, self._shards, self._train_data, self._order[1], self._seed, count)

    def _eval_step(self, variables, shard, data, start):
        batch = in_memory.eval_batch(
            data, start, batch_size=self._eval_batch_size, shard=shard, shards=len(self.devices)
        )
        return self._count(variables, batch)

    def _count(self, variables, batch):
        batch = batch | {"images": self._normalize(batch["images"])}
        return steps.eval_step(variables, batch, apply_fn=self.model.apply, axis_name=AXIS)

    @property
    def _eval_batch_size(self) -> int:
        devices = len(self.devices)
        return -(-min(self._config.eval.batch_size, self._test_size) // devices) * devices

    def evaluate(
        self,
        state: steps.TrainState,
        poll: Callable[[int], None] = lambda done: None,
        outcomes: np.ndarray | None = None,
    ) -> dict[str, float]:
        """Metrics of the test split; see evaluate.evaluate."""
        return evaluate.evaluate(
            lambda start: self._p_eval(state.variables, self._shards, self._test_data, start),
            self._test_size,
            self._eval_batch_size,
            poll,
            outcomes,
        )

    def close(self) -> None:
        """Ends what reads the data, if anything does."""
