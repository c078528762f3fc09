"""The compiled functions of a run: training steps and evaluation over devices, for one seed or several."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils

from regnet_flax import xla_flags
from regnet_flax.data.feeds import Feed
from regnet_flax.errors import DataError
from regnet_flax.training import parallel
from regnet_flax.training.parallel import Placement
from regnet_flax.training.step import TrainState, add_metrics


class Step(NamedTuple):
    """A config's pure functions of one device's part of a batch, for one seed.

    Attributes:
      init: maps a seed to the state before the first step.
      train: maps a state, a batch (see feeds.Feed.batch), its augmentation keys, the seed and the step to the next
        state and the step's metrics.
      evaluate: maps variables and a batch with a mask to step.eval_step's sums.
      parts: the number of parts into which a batch is divided.
    """

    init: Callable[[Any], TrainState]
    train: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    evaluate: Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]]
    parts: int


def take_seed(states: Any, index: jax.Array | int) -> Any:
    """Returns the state of one seed, without the leading seed axis; or the same for any other tree of arrays."""
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, keepdims=False), states)


def put_seed(states: Any, state: Any, index: jax.Array | int) -> Any:
    """Returns the states with that of one seed replaced."""
    return jax.tree.map(lambda a, b: lax.dynamic_update_index_in_dim(a, b, index, 0), states, state)


class Trainer:
    """Compiles a step for one seed or several, each of which trains as it would alone (under vmap, up to rounding).

    With several seeds every leaf of the state has a leading seed axis. Initial weights, the order of the examples and
    their augmentation are those of a separate run with that seed.

    Args:
      step: the functions of one seed and one device.
      feed: the data.
      seeds: the seeds of the runs.
      placement: the devices that share each batch.
      steps_per_call: the most steps per compiled call.
      together: whether to run one vmapped step for all seeds; otherwise one call per seed in turn.
      start: variables that replace initial ones; it may lack some of them.

    Attributes:
      seeds, placement, together: as given.
      steps_per_call: as given, or as many as the feed allows.
      like: shapes, dtypes and placement of the state.
    """

    def __init__(
        self,
        step: Step,
        feed: Feed,
        seeds: Sequence[int],
        placement: Placement,
        *,
        steps_per_call: int = 1,
        together: bool = False,
        start: dict[str, Any] | None = None,
    ):
        self._step, self._feed, self._start = step, feed, start
        self.seeds, self.placement, self.together = tuple(seeds), placement, together and len(seeds) > 1
        self.steps_per_call = min(steps_per_call, feed.most_steps or steps_per_call)
        self._shards = placement.divide(self._local_shards())
        several = (len(self.seeds),) if len(self.seeds) > 1 else ()
        # One function for both uses, so that it is traced once.
        quick = xla_flags.compile_quickly() if placement.devices[0].platform == "cpu" else None
        self._init = jax.jit(step.init, compiler_options=quick)
        self._like_one = self._placed(jax.eval_shape(self._init, np.int32(0)))
        self.like = self._placed(self._like_one, several)
        self._compiling: list[threading.Thread] = []
        take_steps: Any = self._take_steps
        if self.together:
            mapped = {name: 0 if name in feed.own else None for name in feed.axes}
            take_steps = jax.vmap(take_steps, (0, None, mapped, None))
        axes = (None, 0, feed.axes, None)
        self._p_train = parallel.pmap(take_steps, axes, placement.devices, donate=(0,))
        self._p_eval = parallel.pmap(self._evaluate_batch, (None, 0, feed.eval_axes), placement.devices)
        self._take_seed = jax.jit(take_seed, out_shardings=placement.replicated)
        self._put_seed = jax.jit(put_seed, out_shardings=placement.replicated, donate_argnums=0)
        self._stack = jax.jit(
            lambda axis, *trees: jax.tree.map(lambda *a: jnp.stack(a, axis), *trees), static_argnums=0
        )
        self._add_metrics = jax.jit(add_metrics)

    def _placed(self, shapes: Any, axes: tuple[int, ...] = ()) -> Any:
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(axes + a.shape, a.dtype, sharding=self.placement.replicated), shapes
        )

    def _local_shards(self) -> np.ndarray:
        local = jax.process_index()
        return np.array([i for i, d in enumerate(self.placement.devices) if d.process_index == local], np.int32)

    def _take_steps(self, state, shard, arguments, count):
        """Takes `count` steps; returns the state, and each step's metrics, of shape (steps_per_call,)."""
        feed, parts = self._feed, self._step.parts

        def one(index, state):
            step = arguments["step"] + index
            batch, keys = feed.batch(arguments | {"step": step}, shard, parts)
            new, metrics = self._step.train(state, batch, keys, arguments["seed"], step)
            taken = new.step > state.step
            return new, {name: jnp.where(taken, value, 0) for name, value in metrics.items()} | {
                "steps": taken.astype(jnp.int32)
            }

        if self.steps_per_call == 1:
            state, metrics = one(0, state)
            return state, jax.tree.map(lambda a: a[None], metrics)

        def keep(index, carry):
            state, kept = carry
            state, metrics = one(index, state)
            return state, jax.tree.map(lambda a, b: a.at[index].set(b), kept, metrics)

        shapes = jax.eval_shape(one, 0, state)[1]
        kept = jax.tree.map(lambda a: jnp.zeros((self.steps_per_call,), a.dtype), shapes)
        return lax.fori_loop(0, count, keep, (state, kept))

    def _evaluate_batch(self, variables, shard, arguments):
        return self._step.evaluate(variables, self._feed.eval_batch(arguments, shard))

    def initial_state(self) -> TrainState:
        """Returns the state before the first step."""
        states = [self._started(self._init(np.int32(seed))) for seed in self.seeds]
        if len(states) == 1:
            return self.placement.place(states[0])
        return self.placement.place(jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))

    def _started(self, state: TrainState) -> TrainState:
        if self._start is not None:
            state = state.replace(
                params=_replaced(state.params, self._start["params"]),
                batch_stats=_replaced(state.batch_stats, self._start["batch_stats"]),
            )
            if state.ema:
                latest = {"params": state.params, "batch_stats": state.batch_stats}
                state = state.replace(ema=jax.tree.map(jnp.copy, latest))
        # Different machines may compute different last bits, and would stay apart.
        return state if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(state)

    def _arguments(self, step: int) -> dict[str, Any]:
        """Returns the feed's arguments for all seeds; those that differ are stacked after the device axis, if any."""
        each = [self._feed.arguments(step, seed) for seed in self.seeds]
        stacked = {
            name: self._stack(0 if axis is None else axis + 1, *(arguments[name] for arguments in each))
            for name, axis in self._feed.axes.items()
            if name in self._feed.own
        }
        return each[0] | stacked

    def train(self, state: TrainState, totals: Any, step: int, count: int) -> tuple[TrainState, Any, jax.Array]:
        """Takes `count` steps of one epoch from `step`; the given state is donated.

        Args:
          state: the training state.
          totals: sums of each metric, and "steps", the number of steps in them; None for no step yet.
          step: steps taken so far.
          count: at most steps_per_call.

        Returns:
          The next state and totals, and an array that is ready when the state is, and that no later call donates.

        Raises:
          DataError, StreamError: see feeds.Feed.arguments.
        """
        self._wait()
        if len(self.seeds) == 1:
            state, metrics = self._p_train(state, self._shards, self._feed.arguments(step), count)
        elif self.together:
            state, metrics = self._p_train(state, self._shards, self._arguments(step), count)
        else:
            each = []
            for index, seed in enumerate(self.seeds):
                one = self._take_seed(state, index)
                one, metrics = self._p_train(one, self._shards, self._feed.arguments(step, seed), count)
                state = self._put_seed(state, one, index)
                each.append(metrics)
            metrics = self._stack(0, *each)
        return state, self._add_metrics(totals, metrics), metrics["steps"]

    def compile_ahead(self, split: str, size: int, batch_size: int) -> None:
        """Starts to compile training and evaluation in parallel threads; the first calls wait for them.

        It does nothing for a streamed feed, whose arguments must be read first, or for several processes, which must
        compile in the same order. If compilation fails, the call that needs it raises the error.

        Args:
          split, size, batch_size: for evaluation; see `evaluate`.
        """
        if self._feed.most_steps or jax.process_count() > 1:
            return

        def train():
            self.lower_training().compile()

        def evaluate():
            with contextlib.closing(self._feed.eval_arguments(split, self._whole_batch(size, batch_size))) as batches:
                self._p_eval.lower(self._like_one.variables, self._shards, next(batches)).compile()

        def quietly(compile_one: Callable[[], None]) -> None:
            with contextlib.suppress(Exception):
                compile_one()

        for one in (train, evaluate):
            self._compiling.append(threading.Thread(target=quietly, args=(one,), daemon=True))
            self._compiling[-1].start()

    def _wait(self) -> None:
        while self._compiling:
            self._compiling.pop().join()

    def _whole_batch(self, size: int, batch_size: int) -> int:
        devices = self.placement.count
        return -(-min(batch_size, size) // devices) * devices

    def lower_training(self) -> Any:
        """Returns the lowered training step, as from jax.jit; once compiled, it reports its memory use."""
        like, arguments = (
            (self.like, self._arguments(0)) if self.together else (self._like_one, self._feed.arguments(0))
        )
        return self._p_train.lower(like, self._shards, arguments, self.steps_per_call)

    def evaluate(
        self,
        variables: dict[str, Any],
        split: str,
        size: int,
        batch_size: int,
        poll: Callable[[int], None] = lambda done: None,
        outcomes: np.ndarray | None = None,
    ) -> dict[str, Any]:
        """Counts every example of a split once.

        Args:
          variables: "params" and "batch_stats"; with several seeds, each leaf with a seed axis.
          split: "test" or "validation".
          size: examples in the split.
          batch_size: examples per batch, rounded up to a multiple of the devices; the last batch may be short.
          poll: called after each batch with the number of examples done so far.
          outcomes: int (size, n) or, with several seeds, (seeds, size, n); filled with the first n numbers of each
            example's outcomes in eval_step, −1 for a missing example.

        Returns:
          "loss" and "accuracy", means over the examples, "top5_accuracy" if there are more than five classes, and
          "count"; with several seeds, each is an array (seeds,).

        Raises:
          DataError: no example of the split decodes; and see feeds.Feed.arguments.
          StreamError: see feeds.Feed.arguments.
        """
        several = len(self.seeds) > 1
        each = [self._take_seed(variables, i) for i in range(len(self.seeds))] if several else [variables]
        batch_size = self._whole_batch(size, batch_size)
        self._wait()
        sums: list[list[dict[str, jax.Array]]] = []
        with contextlib.closing(self._feed.eval_arguments(split, batch_size)) as batches:
            for number, arguments in enumerate(batches, start=1):
                sums.append([self._p_eval(one, self._shards, arguments) for one in each])
                # Two batches in flight keep a device busy; more would only delay the response to the poll.
                jax.block_until_ready(sums[max(0, len(sums) - 3)])
                poll(min(size, number * batch_size))
        found = []
        for index, parts in enumerate(zip(*sums, strict=True)):
            found.append(mean_metrics(parts, f"none of the {size} {split} images decodes: check that they are images"))
            if outcomes is not None:
                whole = np.concatenate([np.asarray(part["outcomes"]) for part in parts])[:size]
                (outcomes[index] if several else outcomes)[:] = whole[:, : outcomes.shape[-1]]
        return {name: np.array([m[name] for m in found]) for name in found[0]} if several else found[0]

    def close(self) -> None:
        """Ends the processes and threads that read the data, if any."""
        self._wait()
        self._feed.close()


def mean_metrics(parts: Sequence[dict[str, jax.Array]], empty: str) -> dict[str, float]:
    """Converts step.eval_step's sums of each batch to means over a split; DataError(empty) if there is no example."""
    names = [name for name in parts[0] if name != "outcomes"]
    totals = {name: np.sum([np.asarray(part[name]) for part in parts], dtype=np.float64) for name in names}
    count = totals["count"]
    if not count:
        raise DataError(empty)
    metrics = {"loss": float(totals["loss"] / count), "accuracy": float(totals["correct"] / count)}
    if "correct_top5" in totals:
        metrics["top5_accuracy"] = float(totals["correct_top5"] / count)
    return metrics | {"count": int(count)}


def _replaced(tree: dict[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a nested dict in which the arrays of `new`, which may have fewer, replace those of `tree`."""
    return tree | {name: _replaced(tree[name], a) if isinstance(a, Mapping) else a for name, a in new.items()}
