"""The encoded photographs of data sets that are streamed: image folders and TFDS."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from regnet_flax.data.image_folder import DataError
from regnet_flax.text import one_line


class Records(Protocol):
    """The encoded photographs of one split."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> list[tuple[str | IO[bytes], int, str]]:
        """What Pillow can open, the label and the name of each of these examples."""
        ...

    def identity(self) -> Iterable[bytes]:
        """What changes with the files, at the cost of listing them."""
        ...


class FolderRecords:
    """Image files in one folder a class.

    Args:
        root: the directory that holds the splits.
        files: the paths of each class, classes in order.
        labels: of each class.
    """

    def __init__(self, root: Path, files: dict[str, list[str]], labels: dict[str, int]):
        self._root = str(root)
        # An array of bytes: a million paths as str would be slow to hand to worker processes, and large in each.
        names = [os.fsencode(os.path.relpath(path, root)) for paths in files.values() for path in paths]
        self._names = np.array(names, dtype=np.bytes_)
        self._labels = np.concatenate([np.full(len(files[name]), labels[name], np.int32) for name in files])

    def __len__(self) -> int:
        return len(self._labels)

    def _path(self, index: int) -> str:
        return os.path.join(self._root, os.fsdecode(self._names[index]))

    def read(self, indices: Sequence[int]) -> list[tuple[str | IO[bytes], int, str]]:
        return [(path := self._path(index), int(self._labels[index]), path) for index in indices]

    def identity(self) -> Iterable[bytes]:
        with ThreadPoolExecutor(32) as pool:  # network file systems answer slowly, but many at once
            sizes = list(pool.map(lambda index: os.path.getsize(self._path(index)), range(len(self))))
        return self._names.tobytes(), self._labels.tobytes(), np.array(sizes, np.int64).tobytes()


class TfdsRecords:
    """A split of a TFDS data set in ArrayRecord form, whose images TFDS leaves encoded."""

    def __init__(self, builder: Any, split: str):
        import tensorflow_datasets as tfds

        self._what, self._split = f"the copy of {builder.name} in {builder.data_path}", split
        self._info = builder.info.splits[split]
        self._source = builder.as_data_source(
            split=split,
            decoders={"image": tfds.decode.SkipDecoding()},
            file_format=tfds.core.FileFormat.ARRAY_RECORD,
        )

    def __len__(self) -> int:
        return len(self._source)

    def read(self, indices: Sequence[int]) -> list[tuple[str | IO[bytes], int, str]]:
        try:
            examples = self._source.__getitems__(list(indices))
        except Exception as error:  # Each layer below (protobuf, ArrayRecord) raises its own kinds.
            raise DataError(f"{self._what} cannot be read ({one_line(error)}); copy or prepare it again") from error
        return [
            (io.BytesIO(example["image"]), int(example["label"]), self._name(index, example))
            for index, example in zip(indices, examples, strict=True)
        ]

    def _name(self, index: int, example: dict[str, Any]) -> str:
        name = example.get("file_name", b"")
        return f"{self._split} example {index}" + (f" ({os.fsdecode(name)})" if name else "")

    def identity(self) -> Iterable[bytes]:
        return (repr((self._split, self._info.shard_lengths, self._info.num_bytes)).encode(),)
