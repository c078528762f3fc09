"""Feeds, which give each training step and each batch of an evaluation its data.

Batch k of an epoch is a pure function of (seed, epoch, k), so a checkpoint needs only the step to resume. A
`MemoryFeed` holds the data set on the devices as uint8 arrays, without host work between steps; a `StreamFeed` reads,
decodes and transfers batches ahead of time. A feed knows nothing of models and trainers.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Generator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from regnet_flax.data.photos import REMARKS
from regnet_flax.data.sources import Dataset
from regnet_flax.data.stream import Stream, StreamedDataset

Array = jax.Array
Batch = dict[str, Array]

logger = logging.getLogger("regnet_flax")


class Placement(Protocol):
    """Puts host arrays on the devices that share a batch."""

    @property
    def count(self) -> int:
        """The number of devices, over all processes."""
        ...

    def place(self, tree: Any) -> Any:
        """Copies the arrays to every device."""
        ...

    def divide(self, array: np.ndarray) -> Array:
        """Splits this process's rows into one equal part per device: (devices, rows per device, …)."""
        ...


class Feed(Protocol):
    """The trainer's interface to the data.

    Attributes:
      axes: the device axis of each argument of `batch`: 0 if each device has its own part, else None.
      eval_axes: the same for `eval_batch`.
      own: the names of the arguments that differ between seeds.
      most_steps: the most steps that one set of arguments serves; 0 for no limit but the epoch's end.
    """

    axes: dict[str, int | None]
    eval_axes: dict[str, int | None]
    own: tuple[str, ...]
    most_steps: int

    def arguments(self, step: int, seed: int | None = None) -> dict[str, Any]:
        """Makes, on the host, the arguments that `batch` uses inside the compiled step.

        Args:
          step: steps taken so far in the whole run.
          seed: the run's seed; by default the first.

        Raises:
          DataError: an image does not decode and the data set is strict, or the data set cannot be read.
          StreamError: a worker process ended.
        """
        ...

    def batch(self, arguments: dict[str, Any], shard: Array | int = 0, parts: int = 1) -> tuple[Batch, Array]:
        """Returns one device's part of the batch of step `arguments["step"]`.

        Args:
          arguments: see `arguments`; `step` may be raised within an epoch, as far as `most_steps` allows.
          shard: the device's index.
          parts: the number of parts into which the step divides the batch. Each device gets an equal share of every
            part, so that the images in a part do not depend on the number of devices.

        Returns:
          "images", uint8 (n, height, width, channels), and "labels", int32 (n,), and n augmentation keys, each
          determined by (seed, epoch, example).
        """
        ...

    def eval_arguments(self, split: str, batch_size: int) -> Generator[dict[str, Any]]:
        """Yields the arguments of `eval_batch` for each batch of a split, in order; raises like `arguments`."""
        ...

    def eval_batch(self, arguments: dict[str, Any], shard: Array | int = 0) -> Batch:
        """Returns one device's part of a batch: "images", "labels" and "mask", bool (n,), False for padding."""
        ...

    def close(self) -> None:
        """Ends the processes and threads that read the data, if any."""
        ...


def make_feed(
    dataset: Dataset | StreamedDataset,
    seeds: Sequence[int],
    placement: Placement,
    *,
    batch_size: int,
    parts: int = 1,
    total_steps: int = 0,
    workers: int = 0,
    prefetch: int = 2,
) -> Feed:
    """Makes the feed of a data set.

    Args:
      dataset: in memory, or streamed.
      seeds: the seeds of the runs that train on it; each run visits the examples in its own order.
      placement: the devices that batches go to.
      batch_size: over all devices; a multiple of devices × parts.
      parts: see Feed.batch; the host lays out a streamed batch for them.
      total_steps: the run's steps; nothing beyond them is read ahead.
      workers, prefetch: see stream.Stream.
    """
    if isinstance(dataset, StreamedDataset):
        return StreamFeed(dataset, seeds, placement, batch_size, parts, total_steps, workers, prefetch)
    return MemoryFeed(dataset, seeds, placement, batch_size)


class MemoryFeed:
    """A Feed of uint8 arrays that every device holds; see make_feed."""

    def __init__(self, dataset: Dataset, seeds: Sequence[int], placement: Placement, batch_size: int):
        self._dataset, self._seeds, self._placement, self._batch_size = dataset, tuple(seeds), placement, batch_size
        self._placed: dict[str, dict[str, Array]] = {}
        self._orders: dict[int, tuple[int, Array]] = {}
        self.axes: dict[str, int | None] = dict.fromkeys(("data", "order", "seed", "step"))
        self.eval_axes: dict[str, int | None] = {"data": None, "indices": 0}
        self.own, self.most_steps = ("order", "seed"), 0

    def _data(self, split: str) -> dict[str, Array]:
        if split not in self._placed:
            examples = getattr(self._dataset, split)
            self._placed[split] = self._placement.place({"images": examples.images, "labels": examples.labels})
        return self._placed[split]

    def arguments(self, step: int, seed: int | None = None) -> dict[str, Any]:
        """See Feed."""
        seed = self._seeds[0] if seed is None else seed
        size = self._dataset.size("train")
        epoch = step // max(1, size // self._batch_size)
        if self._orders.get(seed, (-1,))[0] != epoch:
            self._orders[seed] = epoch, self._placement.place(epoch_order(seed, epoch, size))
        return {
            "data": self._data("train"),
            "order": self._orders[seed][1],
            "seed": np.int32(seed),
            "step": np.int32(step),
        }

    def batch(self, arguments: dict[str, Any], shard: Array | int = 0, parts: int = 1) -> tuple[Batch, Array]:
        """See Feed."""
        shards = self._placement.count
        return train_batch(**arguments, batch_size=self._batch_size, shard=shard, shards=shards, parts=parts)

    def eval_arguments(self, split: str, batch_size: int) -> Generator[dict[str, Any]]:
        """See Feed."""
        for start in range(0, self._dataset.size(split), batch_size):
            indices = np.arange(start, start + batch_size, dtype=np.int32).reshape(jax.process_count(), -1)
            yield {"data": self._data(split), "indices": self._placement.divide(indices[jax.process_index()])}

    def eval_batch(self, arguments: dict[str, Any], shard: Array | int = 0) -> Batch:
        """See Feed."""
        return eval_batch(**arguments)

    def close(self) -> None:
        """See Feed."""


class StreamFeed:
    """A Feed that reads and decodes photographs while the model trains; see make_feed."""

    def __init__(
        self,
        dataset: StreamedDataset,
        seeds: Sequence[int],
        placement: Placement,
        batch_size: int,
        parts: int = 1,
        total_steps: int = 0,
        workers: int = 0,
        prefetch: int = 2,
    ):
        self._dataset, self._seeds, self._placement, self._batch_size = dataset, tuple(seeds), placement, batch_size
        self._parts, self._total_steps = parts, total_steps
        self._workers, self._prefetch = workers, prefetch
        self._steps_per_epoch = max(1, dataset.size("train") // batch_size)
        self._streams: dict[int, Stream] = {}
        self._reported: set[str] = set()
        self.axes: dict[str, int | None] = {"images": 0, "labels": 0, "examples": 0, "seed": None, "step": None}
        self.eval_axes: dict[str, int | None] = dict.fromkeys(("images", "labels", "mask"), 0)
        self.own, self.most_steps = ("images", "labels", "examples", "seed"), 1

    def arguments(self, step: int, seed: int | None = None) -> dict[str, Any]:
        """See Feed."""
        seed = self._seeds[0] if seed is None else seed
        stream = self._streams.get(seed)
        if stream is None or stream.next != step:
            if stream is not None:
                stream.close()
            make = self._dataset.train_batches(
                seed, self._batch_size, jax.process_index(), jax.process_count(), self._placement.count, self._parts
            )
            stream = self._streams[seed] = self._read(make, range(step, max(step + 1, self._total_steps)))
        return next(stream) | {"seed": np.int32(seed), "step": np.int32(step)}

    def batch(self, arguments: dict[str, Any], shard: Array | int = 0, parts: int = 1) -> tuple[Batch, Array]:
        """See Feed; `parts` must be the number that the feed was made with."""
        assert parts == self._parts
        epoch = arguments["step"] // self._steps_per_epoch
        keys = example_keys(arguments["seed"], epoch, arguments["examples"])
        return {name: arguments[name] for name in ("images", "labels")}, keys

    def eval_arguments(self, split: str, batch_size: int) -> Generator[dict[str, Any]]:
        """See Feed."""
        make = self._dataset.eval_batches(split, batch_size, jax.process_index(), jax.process_count())
        stream = self._read(make, range(-(-self._dataset.size(split) // batch_size)))
        try:
            yield from stream
        finally:
            stream.close()

    def eval_batch(self, arguments: dict[str, Any], shard: Array | int = 0) -> Batch:
        """See Feed."""
        return arguments

    def _read(self, make_batch: Any, indices: range) -> Stream:
        return Stream(make_batch, indices, workers=self._workers, prefetch=self._prefetch, put=self._put)

    def _put(self, batch: dict[str, Any]) -> dict[str, Array]:
        for line in batch.pop("skipped").splitlines():
            if line not in self._reported:
                self._reported.add(line)
                logger.warning("%s", line if line in REMARKS else f"left out {line}")
        return {name: self._placement.divide(array) for name, array in batch.items()}

    def close(self) -> None:
        """Ends worker processes and threads."""
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()


@functools.partial(jax.jit, static_argnames="size")
def epoch_order(seed: Array | int, epoch: Array | int, size: int) -> Array:
    """Returns the order in which an epoch visits `size` examples: int32 (size,)."""
    return jax.random.permutation(jax.random.fold_in(jax.random.key(seed), epoch), size)


def train_batch(
    data: Batch,
    order: Array,
    seed: Array | int,
    step: Array,
    *,
    batch_size: int,
    shard: Array | int = 0,
    shards: int = 1,
    parts: int = 1,
) -> tuple[Batch, Array]:
    """Returns one device's part of the batch of a step.

    The examples beyond the last whole batch of an epoch, which differ between epochs, are skipped.

    Args:
      data: "images", uint8 (size, height, width, channels), and "labels", int32 (size,).
      order: `epoch_order` of the epoch that `step` is in.
      seed: the run's seed.
      step: steps taken so far in the whole run.
      batch_size: over all shards; a multiple of `shards`.
      shard: which of the `shards` equal parts.
      parts: the number of parts of the batch. Every shard has a share of each part, in the order of the parts, so that
        the parts are the same for any number of shards.

    Returns:
      "images" and "labels" of batch_size / shards examples, and their augmentation keys, each determined by (seed,
      epoch, example).
    """
    epoch, k = jnp.divmod(step, order.shape[0] // batch_size)
    indices = jax.lax.dynamic_slice(order, (k * batch_size,), (batch_size,))
    indices = indices.reshape(parts, shards, -1)[:, shard].reshape(-1)
    return {name: array[indices] for name, array in data.items()}, example_keys(seed, epoch, indices)


def example_keys(seed: Array | int, epoch: Array | int, indices: Array) -> Array:
    """Returns the augmentation keys of examples (N,): random keys (N,), each determined by (seed, epoch, example)."""
    # One more fold_in, because epoch_order has consumed the epoch's own key.
    epoch_key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), epoch), 1)
    return jax.vmap(jax.random.fold_in, (None, 0))(epoch_key, indices)


def eval_batch(data: Batch, indices: Array) -> Batch:
    """Returns the examples at `indices`, int32 (n,), some of which may lie beyond the last one.

    Returns:
      "images" and "labels" of n examples, and "mask", bool, False beyond the last example, which is repeated there.
    """
    size = data["labels"].shape[0]
    batch = {name: array[jnp.minimum(indices, size - 1)] for name, array in data.items()}
    return batch | {"mask": indices < size}
