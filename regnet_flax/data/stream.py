"""Data sets too large for memory: Grain reads, decodes and crops photographs on the host, batch by batch.

Batch k of an epoch is a pure function of (seed, epoch, k), as for data in memory: a checkpoint needs only the step to
resume, and the numbers of worker processes and threads do not change a bit. The host does what depends on a
photograph's own size: decoding and `random_resized_crop`. Flips, colour and normalisation happen in the compiled step,
as for data in memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from typing import Any

import numpy as np

from regnet_flax.data.batches import EvalBatches, FolderRecords, HostBatch, Records, Subset, TrainBatches
from regnet_flax.data.folder.listing import list_image_folder
from regnet_flax.data.sources import channel_statistics, check_classes, hold_out, holds_out
from regnet_flax.data.tfds import TfdsRecords, prepare_tfds
from regnet_flax.errors import DataError, StreamError, one_line

CROP = "random_resized_crop"  # in dataset.augment; must come first, because it runs while decoding
STREAMED = ("imagenet2012", "folder")  # the data sets that can be streamed
FOLDER_BYTES = 4 * 2**30  # a folder whose decoded images need more is streamed
SAMPLE = 1000  # training images from which a folder's mean and standard deviation are computed
ON_DEVICES = 2  # batches on the devices besides the one in use
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET_SIZE = 224


@dataclasses.dataclass(frozen=True)
class StreamedDataset:
    """A data set that is read during training; its counterpart in memory is sources.Dataset.

    Attributes:
        name: one of STREAMED.
        train: the training split.
        test: the test split.
        class_names: the name of each label.
        image_size: height and width of the resulting images.
        crop: whether to take random crops for training and centre crops for testing; else the whole is resized.
        strict: raise an error for a photograph that does not decode, instead of skipping it.
        mean: per channel, for pixels in 0…1; () to compute it.
        std: likewise.
        validation: the split that is evaluated during training, if it is not the test split.
    """

    name: str
    train: Records
    test: Records
    class_names: tuple[str, ...]
    image_size: int
    crop: bool
    strict: bool = False
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    skipped: tuple[str, ...] = ()  # empty: known only while reading
    validation: Records | None = None
    notes: tuple[str, ...] = ()  # see sources.Dataset

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        return self.image_size, self.image_size, 3

    @property
    def evaluated(self) -> str:
        """The split that is evaluated during training: "validation" if there is one, else "test"."""
        return "test" if self.validation is None else "validation"

    def size(self, split: str) -> int:
        """The number of examples of "train", "validation" or "test", including those that do not decode."""
        return len(getattr(self, split))

    def fingerprint(self) -> str:
        """Returns 16 hex digits that change with the name, the class names, the splits, and files' names or sizes."""
        digest = hashlib.blake2b(repr((self.name, self.class_names)).encode(), digest_size=8)
        for records in (self.train, self.test) if self.validation is None else (self.train, self.test, self.validation):
            for part in records.identity():
                digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Returns mean and standard deviation of each channel: ImageNet's usual ones, or those of a folder.

        A folder's come from at most SAMPLE images, evenly spaced in the training split and decoded as for testing.
        """
        if self.mean:
            return self.mean, self.std
        count = min(SAMPLE, len(self.train))
        indices = [number * len(self.train) // count for number in range(count)]
        make = EvalBatches(self.train, self.image_size, self.crop, self.strict, batch_size=1)
        with ThreadPoolExecutor() as pool:
            batches = [batch for batch in pool.map(make, indices) if batch["mask"][0]]
        if not batches:
            raise DataError(f"{self.name}: none of {count} training images decodes; check that they are images")
        return channel_statistics(np.concatenate([batch["images"] for batch in batches]))

    def images(self, split: str, indices: np.ndarray) -> np.ndarray:
        """Returns some of a split's images as evaluation sees them: uint8 (N, height, width, 3)."""
        make = self.eval_batches(split, 1)
        return np.concatenate([make(int(index))["images"] for index in indices])

    def train_batches(
        self,
        seed: int,
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
        shards: int = 0,
        parts: int = 1,
    ) -> TrainBatches:
        """Returns the maker of one process's training batches; see TrainBatches."""
        common = self.image_size, self.crop, self.strict, batch_size, process_index, process_count
        return TrainBatches(self.train, *common, seed=seed, shards=shards, parts=parts)

    def eval_batches(self, split: str, batch_size: int, process_index: int = 0, process_count: int = 1) -> EvalBatches:
        """Returns the maker of one process's evaluation batches of a split; see EvalBatches."""
        records = getattr(self, split)
        return EvalBatches(records, self.image_size, self.crop, self.strict, batch_size, process_index, process_count)


class Stream(Iterator[Any]):
    """Batches made ahead of time, in order, and put on the devices in the background.

    Args:
        make_batch: maps an index to a batch; it is pickled if there are workers.
        indices: the indices of the batches, with step 1.
        workers: the number of processes that make them; 0 makes them in this process. All cores are used in any case:
            the processes share one thread per core.
        prefetch: batches that each process keeps ready.
        put: puts a batch on the devices; called in a thread.

    Attributes:
        next: the index of the next batch.

    Raises:
        DataError: Grain is not installed; while iterating, whatever `make_batch` raises.
        StreamError: while iterating, a worker process ended, or reading failed in another way.
    """

    def __init__(
        self,
        make_batch: Callable[[int], HostBatch],
        indices: range,
        *,
        workers: int,
        prefetch: int,
        put: Callable[[HostBatch], Any] = lambda batch: batch,
    ):
        try:
            import grain
            from absl import flags
        except ImportError as error:
            raise DataError(
                f"data sets are streamed with Grain, which cannot be imported ({one_line(error)}): pip install grain, "
                "or hold a folder in memory with --config.dataset.in_memory=always"
            ) from error
        self.next = indices.start
        threads = max(1, _cores() // max(1, workers))
        numbers = grain.MapDataset.range(indices.start, indices.stop)
        read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + (0 if workers else prefetch))
        batches = numbers.map(make_batch).to_iter_dataset(read)
        if workers:
            if not flags.FLAGS.is_parsed():  # absl's global flags: Grain reads them, this program does not
                flags.FLAGS.mark_as_parsed()
            _start_tracker()
            options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)
            batches = batches.mp_prefetch(options, worker_init_fn=_start_worker)
        batches = grain.experimental.ThreadPrefetchIterDataset(batches.map(put), prefetch_buffer_size=ON_DEVICES)
        # Threads and processes started here inherit the mask: only the run handles a signal to all, such as Ctrl-C.
        handled = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, handled)
        try:
            self._iterator: Any = iter(batches)
            self._iterator.start_prefetch()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def __next__(self) -> Any:
        try:
            batch = next(self._iterator)
        except (StopIteration, DataError):
            raise
        except Exception as error:  # from Grain, when a process was killed, or from the system
            raise StreamError(
                f"reading the data stopped ({one_line(error)}): run the same command again, or with another "
                "--config.dataset.workers"
            ) from error
        self.next += 1
        return batch

    def close(self) -> None:
        """Ends threads and processes."""
        self._iterator.close()
        self._iterator = iter(())  # Grain's iterator holds a batch in shared memory, which would outlive this process


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_tracker() -> None:
    """Starts, without its warnings, the process that frees shared memory left by a killed worker."""
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = "ignore"
    try:
        resource_tracker.ensure_running()
    finally:
        os.environ.pop("PYTHONWARNINGS")
        if before is not None:
            os.environ["PYTHONWARNINGS"] = before


def _start_worker(index: int, count: int) -> None:
    """Runs first in a worker process. Its signals are blocked: only its parent ends it."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)  # Grain's worker would wait forever for a killed parent

    threading.Thread(target=watch, daemon=True).start()


def open_stream(
    name: str,
    *,
    data_dir: str,
    image_size: int,
    num_classes: int = 0,
    in_memory: str = "auto",
    augment: Sequence[str] = (),
    strict: bool = False,
    validation: float = 0,
    seed: int = 0,
    class_names: tuple[str, ...] = (),
) -> StreamedDataset | None:
    """Opens a data set for streaming.

    Args:
        name: as for sources.load_dataset, or "imagenet2012".
        data_dir: as for sources.load_dataset.
        image_size: height and width to which photographs are resized; 0 means 224 for imagenet2012.
        num_classes: the number of classes that the data must have; 0 accepts any.
        in_memory: "never" streams; "auto" streams imagenet2012, data cropped while decoding, and a folder whose images
            would need more than FOLDER_BYTES.
        augment: the names of dataset.augment; CROP among them makes random crops.
        strict: see StreamedDataset.
        validation: as for sources.load_dataset. The same photographs are held out if all of them decode.
        seed: determines which these are.
        class_names: see list_image_folder.

    Returns:
        The data set; None if it should be held in memory.

    Raises:
        DataError: the data set is missing or unreadable, has other classes, or is too small for `validation`.
    """
    crop = CROP in augment
    if name == "imagenet2012":
        dataset = _imagenet(data_dir, image_size or IMAGENET_SIZE, crop, strict)
    elif name == "folder" and in_memory != "always":
        listing = list_image_folder(data_dir, validation, seed=seed, class_names=class_names)
        splits = listing.splits
        count = sum(len(files) for classes in splits.values() for files in classes.values())
        if in_memory == "auto" and not crop and count * image_size**2 * 3 <= FOLDER_BYTES:
            return None
        if not image_size:
            raise DataError(
                f"{listing.root} is streamed: set --config.dataset.image_size, to which its images are resized"
            )
        labels = {name: label for label, name in enumerate(listing.class_names)}
        records = {split: FolderRecords(listing.root, classes, labels) for split, classes in splits.items()}
        dataset = StreamedDataset(
            name,
            records["train"],
            records["test"],
            listing.class_names,
            image_size,
            crop,
            strict,
            validation=records.get("validation"),
            notes=(listing.uses, *listing.notes),
        )
    else:
        return None
    check_classes(name, num_classes, len(dataset.class_names))
    if holds_out(dataset, name, data_dir, validation):
        train = dataset.train
        labels = train.labels if isinstance(train, FolderRecords) else None  # TFDS needs to read to know its labels
        kept, held = hold_out(name, len(train), validation, seed, labels)
        dataset = dataclasses.replace(dataset, train=Subset(train, kept), validation=Subset(train, held))
    return dataset


def _imagenet(data_dir: str, image_size: int, crop: bool, strict: bool) -> StreamedDataset:
    builder = prepare_tfds("imagenet2012", data_dir)
    if missing := [split for split in ("train", "validation") if split not in builder.info.splits]:
        raise DataError(f"the copy of imagenet2012 in {builder.data_path} has no split {missing[0]}: prepare it again")
    class_names = tuple(builder.info.features["label"].names)
    splits = TfdsRecords(builder, "train"), TfdsRecords(builder, "validation")
    return StreamedDataset(
        "imagenet2012", *splits, class_names, image_size, crop, strict, mean=IMAGENET_MEAN, std=IMAGENET_STD
    )
