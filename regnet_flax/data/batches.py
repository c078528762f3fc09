"""Batches of streamed photographs, as pure functions of their number.

They run in threads and worker processes; the batches are bitwise the same for any number of these.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from regnet_flax.data import photos
from regnet_flax.errors import DataError, one_line, printable

SUBSTITUTES = 100  # how many examples to try in place of one that does not decode

HostBatch = dict[str, Any]


class Records(Protocol):
    """The encoded photographs of one split."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> list[tuple[str | IO[bytes], int, str]]:
        """Returns a file that Pillow can open, the label and the name of each of these examples."""
        ...

    def identity(self) -> Iterable[bytes]:
        """Yields bytes that change when the files change; it costs no more than listing them."""
        ...


class FolderRecords:
    """Image files, one folder per class.

    Args:
        root: the directory that holds the splits.
        files: the paths of each class, with the classes in order.
        labels: the label of each class.

    Attributes:
        labels: int32 (N,), the label of each file.
    """

    def __init__(self, root: Path, files: dict[str, list[str]], labels: dict[str, int]):
        self._root = str(root)
        # An array of bytes: a million str paths would be slow to pass to worker processes, and large in each.
        names = [os.fsencode(os.path.relpath(path, root)) for paths in files.values() for path in paths]
        self._names = np.array(names, dtype=np.bytes_)
        counts = [len(paths) for paths in files.values()]
        self.labels = np.repeat(np.array([labels[name] for name in files], np.int32), counts)

    def __len__(self) -> int:
        return len(self.labels)

    def _path(self, index: int) -> str:
        return os.path.join(self._root, os.fsdecode(self._names[index]))

    def read(self, indices: Sequence[int]) -> list[tuple[str | IO[bytes], int, str]]:
        return [(path := self._path(index), int(self.labels[index]), path) for index in indices]

    def identity(self) -> Iterable[bytes]:
        with ThreadPoolExecutor(32) as pool:  # network file systems are slow, but answer many requests at once
            sizes = list(pool.map(lambda index: _size(self._path(index)), range(len(self))))
        return self._names.tobytes(), self.labels.tobytes(), np.array(sizes, np.int64).tobytes()


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:  # a dangling link; decoding it will report it
        return -1


class Subset:
    """Some of a split's records, in the order of `indices`, int (N,)."""

    def __init__(self, records: Records, indices: np.ndarray):
        self._records, self._indices = records, indices

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, indices: Sequence[int]) -> list[tuple[str | IO[bytes], int, str]]:
        return self._records.read(self._indices[list(indices)].tolist())

    def identity(self) -> Iterable[bytes]:
        return *self._records.identity(), self._indices.astype(np.int64).tobytes()


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """Returns the order in which an epoch visits `size` examples: int32 (size,).

    It uses NumPy because workers have no device. RandomState's stream is frozen, so every NumPy version gives the same.
    """
    return np.random.RandomState((seed, epoch)).permutation(size).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class _Batches:
    """Makes one process's part of each batch; each worker process gets a copy of this object.

    Attributes:
        records: the records of the split.
        image_size: height and width of the resulting images.
        crop: see StreamedDataset.
        strict: see StreamedDataset.
        batch_size: over all processes; a multiple of their number.
        process_index: which of the `process_count` equal parts of each batch.
    """

    records: Records
    image_size: int
    crop: bool
    strict: bool
    batch_size: int
    process_index: int = 0
    process_count: int = 1

    @property
    def _local(self) -> int:
        return self.batch_size // self.process_count

    def _decode(
        self, file: str | IO[bytes], name: str, box: Callable[[int, int], photos.Box], remarks: list[str]
    ) -> np.ndarray | str:
        """Returns the image, or "name: reason" if it does not decode."""
        try:
            return photos.read_crop(file, self.image_size, box, remarks=remarks)
        except Exception as error:  # Pillow's decoders raise nearly anything for a damaged file.
            if self.strict:
                raise DataError(
                    f"{name} does not decode ({one_line(error)}); fix or remove it, or set "
                    "--config.dataset.strict=False to leave such images out"
                ) from error
            return printable(f"{name}: {one_line(error)}")

    def _empty(self) -> HostBatch:
        shape = (self._local, self.image_size, self.image_size, 3)
        return {"images": np.zeros(shape, np.uint8), "labels": np.zeros(self._local, np.int32)}


@dataclasses.dataclass(frozen=True)
class TrainBatches(_Batches):
    """Maps a step of the run to "images", uint8 (n, size, size, 3), "labels", int32 (n,), "examples" and "skipped".

    "examples", int32 (n,), are the indices from which the augmentation keys derive; "skipped" has a line for each
    photograph that does not decode, and the applicable lines of photos.REMARKS. The next photograph in the data's
    order that decodes replaces one that does not.

    Attributes:
        seed: the run's seed.
        shards: devices of all processes; 0 for one per process.
        parts: the number of parts into which a step divides a batch; see feeds.Feed.batch.
    """

    seed: int = 0
    shards: int = 0
    parts: int = 1

    def _positions(self) -> np.ndarray:
        """Returns the positions of this process's rows in the whole batch, by device, and within each by part."""
        shards = self.shards or self.process_count
        places = np.arange(self.batch_size).reshape(self.parts, self.process_count, shards // self.process_count, -1)
        return places[:, self.process_index].swapaxes(0, 1).ravel()

    def __call__(self, step: int) -> HostBatch:
        size = len(self.records)
        epoch, k = divmod(step, size // self.batch_size)
        positions = self._positions()
        examples = epoch_order(self.seed, epoch, size)[k * self.batch_size + positions]
        # Drawn for the whole batch, so that the result does not depend on the number of processes.
        random = np.random.RandomState((self.seed, epoch, k)).random_sample((self.batch_size, photos.UNIFORMS))
        random = random[positions]
        batch, skipped, remarks = self._empty(), [], []
        for row, (index, record) in enumerate(
            zip(examples.tolist(), self.records.read(examples.tolist()), strict=True)
        ):
            box = functools.partial(photos.random_box, uniforms=random[row]) if self.crop else photos.whole_box
            for attempt in range(min(SUBSTITUTES, size)):
                if attempt:
                    (record,) = self.records.read([(index + attempt) % size])
                file, label, name = record
                image = self._decode(file, name, box, remarks)
                if not isinstance(image, str):
                    batch["images"][row], batch["labels"][row] = image, label
                    break
                skipped.append(image)
            else:
                raise DataError(f"{skipped[-1]}; nor do {len(skipped) - 1} images before it decode: check the data set")
        return batch | {"examples": examples, "skipped": "\n".join([*skipped, *sorted(set(remarks))])}


@dataclasses.dataclass(frozen=True)
class EvalBatches(_Batches):
    """Maps k to "images", "labels" and "mask", bool (n,): the k-th batch in the data's order.

    The mask is False beyond the last example and for photographs that do not decode. "skipped" names these, and has the
    applicable lines of photos.REMARKS.
    """

    def __call__(self, k: int) -> HostBatch:
        first = k * self.batch_size + self.process_index * self._local
        examples = range(first, max(first, min(first + self._local, len(self.records))))
        batch, skipped, remarks = self._empty(), [], []
        batch["mask"] = np.zeros(self._local, bool)
        box = functools.partial(photos.centre_box, size=self.image_size) if self.crop else photos.whole_box
        for row, (file, label, name) in enumerate(self.records.read(examples) if examples else ()):
            image = self._decode(file, name, box, remarks)
            if isinstance(image, str):
                skipped.append(image)
            else:
                batch["images"][row], batch["labels"][row], batch["mask"][row] = image, label, True
        return batch | {"skipped": "\n".join([*skipped, *sorted(set(remarks))])}
