"""Training on a data set that is streamed: its batches are put on the devices ahead of time, in the background."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from regnet_flax.data import feeds, stream
from regnet_flax.training import evaluate
from regnet_flax.training import step as steps
from regnet_flax.training.trainer import Program

logger = logging.getLogger("regnet_flax")


class StreamedProgram(Program):
    """A Program whose data set is a StreamedDataset; it takes one step a call."""

    def _place_data(self, dataset: stream.StreamedDataset) -> None:
        self._dataset = dataset
        self._batches: stream.Stream | None = None
        self._names = tuple(name for name in self._config.dataset.augment if name != stream.CROP)
        self._reported: set[str] = set()

    def _compile(self, parallelize: Callable[..., Any]) -> None:
        self.steps_per_call = 1
        self._p_train = parallelize(self._train_on, (None, 0, None), donate=True)
        self._p_eval = parallelize(self._eval_on, (None, 0))

    def _train_on(self, state, batch, seed):
        keys = feeds.example_keys(seed, state.step // self.steps_per_epoch, batch["examples"])
        state = self._train_step(state, batch, keys, self._names, seed)
        return state, state.step

    def train(self, state: steps.TrainState, step: int, count: int) -> tuple[steps.TrainState, jax.Array]:
        """Takes a step; see Program.train.

        Raises:
          DataError: a photograph does not decode and the data set is strict, or the data set cannot be read.
          StreamError: a worker process ended.
        """
        assert count == 1
        if self._batches is None or self._batches.next != step:
            self.close()
            parts = jax.process_index(), jax.process_count()
            make = self._dataset.train_batches(self._config.seed, self._config.train.batch_size, *parts)
            self._batches = self._read(make, range(step, self.total_steps))
        return self._p_train(state, next(self._batches), self._seed)

    def _eval_on(self, variables, batch):
        return self._count(variables, batch)

    def evaluate(
        self,
        state: steps.TrainState,
        poll: Callable[[int], None] = lambda done: None,
        outcomes: np.ndarray | None = None,
    ) -> dict[str, float]:
        """Metrics of the test split, but for photographs that do not decode; see evaluate.evaluate.

        Raises:
          DataError, StreamError: see train; also if no photograph decodes.
        """
        size = self._eval_batch_size
        make = self._dataset.eval_batches("test", size, jax.process_index(), jax.process_count())
        with contextlib.closing(self._read(make, range(-(-self._test_size // size)))) as batches:
            return evaluate.evaluate(
                lambda _: self._p_eval(state.variables, next(batches)), self._test_size, size, poll, outcomes
            )

    def _read(self, make_batch: Callable[[int], Any], indices: range) -> stream.Stream:
        settings = self._config.dataset
        return stream.Stream(make_batch, indices, workers=settings.workers, prefetch=settings.prefetch, put=self._put)

    def _put(self, batch: dict[str, Any]) -> dict[str, jax.Array]:
        for line in batch.pop("skipped").splitlines():
            if line not in self._reported:
                self._reported.add(line)
                logger.warning("left out %s", line)
        devices = sum(device.process_index == jax.process_index() for device in self.devices)

        def put(array: np.ndarray) -> jax.Array:
            parts = array.reshape(devices, len(array) // devices, *array.shape[1:])
            return jax.make_array_from_process_local_data(self._divided, parts)

        return {name: put(array) for name, array in batch.items()}

    def close(self) -> None:
        """Ends worker processes and threads."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None
