"""Several seeds of one model in one compiled program: every leaf of the state has a leading seed axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from regnet_flax.data import feeds
from regnet_flax.data.sources import Dataset
from regnet_flax.training import step as steps
from regnet_flax.training.trainer import Program


def with_seed_axis(like: Any, seeds: int) -> Any:
    """Shapes, dtypes and placement of a state, with an axis of so many seeds before each shape."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((seeds, *a.shape), a.dtype, sharding=a.sharding), like)


def of_one(states: Any, index: jax.Array | int) -> Any:
    """The state of one seed, or any other tree of arrays with a seed axis, without that axis."""
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, keepdims=False), states)


def put_back(states: Any, state: Any, index: jax.Array | int) -> Any:
    """The states with that of one seed replaced."""
    return jax.tree.map(lambda a, b: lax.dynamic_update_index_in_dim(a, b, index, 0), states, state)


class SeedsProgram(Program):
    """A Program whose state holds several seeds, each of which trains as it would alone; vmapped, to rounding.

    Initial weights, the order of the examples and their augmentation are those of a lone run with that seed.

    Args:
      config, dataset, devices, parallelize, start: see Program; the config's own seed is not used.
      seeds: of the runs.
      together: "always", one vmapped step for all seeds; "never", a call for each in turn; "auto": in turn on a CPU,
        where XLA runs the grouped convolutions that vmap makes of batched weights badly.

    Attributes:
      seeds: as given.
      together: whether the seeds' steps are vmapped.
    """

    def __init__(
        self,
        config: Any,
        dataset: Dataset,
        devices: list[Any],
        parallelize: Callable[..., Any],
        start: dict[str, Any] | None = None,
        *,
        seeds: Sequence[int],
        together: str = "auto",
    ):
        self.together = together == "always" or (together == "auto" and devices[0].platform != "cpu")
        super().__init__(config, dataset, devices, parallelize, start)
        self.seeds = tuple(seeds)
        self.like = with_seed_axis(self.like, len(self.seeds))
        self._seeds = self.place(np.array(self.seeds, np.int32))
        self._of_one = jax.jit(of_one, out_shardings=self._replicated)
        self._put_back = jax.jit(put_back, out_shardings=self._replicated, donate_argnums=0)

    def _compile(self, parallelize: Callable[..., Any]) -> None:
        super()._compile(parallelize)
        if self.together:
            step = jax.vmap(self._train_steps, (0, None, None, 0, 0, None))
            self._p_train = parallelize(step, (None, 0, None, None, None, None), donate=True)

    def initial_state(self) -> steps.TrainState:
        """The states before the first step."""
        one = jax.jit(self._initial_state)
        states = [self._first_state(one, np.int32(seed)) for seed in self.seeds]
        return self.place(jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))

    def train(self, state: steps.TrainState, step: int, count: int) -> tuple[steps.TrainState, jax.Array]:
        """See Program.train; every seed takes `count` steps."""
        epoch = step // self.steps_per_epoch
        if self._order[0] != epoch:
            orders = [feeds.epoch_order(seed, epoch, self._size) for seed in self.seeds]
            self._order = epoch, self.place(jnp.stack(orders))
        if self.together:
            return self._p_train(state, self._shards, self._train_data, self._order[1], self._seeds, count)
        done = self._seeds
        for index in range(len(self.seeds)):
            one, order, seed = self._of_one((state, self._order[1], self._seeds), index)
            one, done = self._p_train(one, self._shards, self._train_data, order, seed, count)
            state = self._put_back(state, one, index)
        return state, done

    def evaluate(
        self,
        state: steps.TrainState,
        poll: Callable[[int], None] = lambda done: None,
        outcomes: np.ndarray | None = None,
    ) -> dict[str, Any]:
        """Metrics of the test split, each an array (seeds,); one seed after another, as a lone run is evaluated.

        The outcomes are the first seed's, which alone is evaluated where they are asked for.
        """
        if outcomes is not None:
            return super().evaluate(self._of_one(state, 0), poll, outcomes)
        each = [super(SeedsProgram, self).evaluate(self._of_one(state, i), poll) for i in range(len(self.seeds))]
        return {name: np.array([metrics[name] for metrics in each]) for name in each[0]}


def averaged(line: dict[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    """A line of metrics.jsonl: means over the seeds, and each seed's own values under "seeds".

    Args:
      line: numbers, and arrays (seeds,) of what each seed has of its own.
      seeds: of the run, in the arrays' order.

    Returns:
      Plain numbers by the names of `line`, and `{"seeds": {"0": {"train_loss": …}, …}}` for several seeds.
    """
    several = {name: np.asarray(value) for name, value in line.items() if np.ndim(value)}
    plain = {n: v.item() if isinstance(v, (np.ndarray, np.generic)) else v for n, v in line.items() if n not in several}
    if not several:
        return plain
    of = {str(s): {n: float(v[i]) for n, v in several.items() if np.isfinite(v[i])} for i, s in enumerate(seeds)}
    return {name: plain[name] if name in plain else float(np.mean(several[name])) for name in line} | {"seeds": of}
