"""Data sets too large for memory: photographs read, decoded and cropped on the host by Grain, batch by batch.

Batch k of an epoch is a pure function of (seed, epoch, k), as it is for data in memory: only the step needs saving to
resume, and neither worker processes nor threads change a bit of it. The host does what depends on a photograph's own
size, decoding and `random_resized_crop`; flips, colour and normalisation happen in the compiled step, as they do for
data in memory.
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
from regnet_flax.data.folder.listing import is_divided, list_image_folder
from regnet_flax.data.sources import channel_statistics, check_classes, hold_out
from regnet_flax.data.tfds import TfdsRecords, prepare_tfds
from regnet_flax.errors import DataError, StreamError, one_line

CROP = "random_resized_crop"  # in dataset.augment; must come first, and is done while decoding
STREAMED = ("imagenet2012", "folder")  # the data sets that can be streamed
FOLDER_BYTES = 4 * 2**30  # of decoded images: a folder that would take more is streamed
SAMPLE = 1000  # training images from which mean and standard deviation of a folder are computed
ON_DEVICES = 2  # batches on the devices beside the one in use
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET_SIZE = 224


@dataclasses.dataclass(frozen=True)
class StreamedDataset:
    """A data set that is read while it is trained on; its counterpart in memory is sources.Dataset.

    Attributes:
        name: one of STREAMED.
        train: the training split.
        test: the test split.
        class_names: the name of each label.
        image_size: height and width of what the photographs become.
        crop: whether to crop at random for training and the centre for testing; else the whole is resized.
        strict: a photograph that does not decode is an error, instead of being left out.
        mean: of each channel, for pixels in 0…1; () to compute it.
        std: likewise.
        validation: the split that is evaluated while training, if it is not the test split.
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
    skipped: tuple[str, ...] = ()  # known while reading only
    validation: Records | None = None
    notes: tuple[str, ...] = ()  # see sources.Dataset

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        return self.image_size, self.image_size, 3

    @property
    def evaluated(self) -> str:
        """The split that is evaluated while training: "validation" where there is one, else "test"."""
        return "test" if self.validation is None else "validation"

    def size(self, split: str) -> int:
        """The number of examples of "train", "validation" or "test", those that do not decode included."""
        return len(getattr(self, split))

    def fingerprint(self) -> str:
        """Returns 16 hex digits that change with the name, the class names, the splits, or files' names or sizes."""
        digest = hashlib.blake2b(repr((self.name, self.class_names)).encode(), digest_size=8)
        for records in (self.train, self.test) if self.validation is None else (self.train, self.test, self.validation):
            for part in records.identity():
                digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel: ImageNet's usual, a folder's from at most SAMPLE images.

        These lie at equal distances in the training split, and are decoded as for testing.
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
        """Some of a split's images as they are evaluated, uint8 (N, height, width, 3)."""
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
        """What makes the training batches of a process; see TrainBatches."""
        common = self.image_size, self.crop, self.strict, batch_size, process_index, process_count
        return TrainBatches(self.train, *common, seed=seed, shards=shards, parts=parts)

    def eval_batches(self, split: str, batch_size: int, process_index: int = 0, process_count: int = 1) -> EvalBatches:
        """What makes the batches of a split for evaluation, one process's part; see EvalBatches."""
        records = getattr(self, split)
        return EvalBatches(records, self.image_size, self.crop, self.strict, batch_size, process_index, process_count)


class Stream(Iterator[Any]):
    """Batches made ahead of time, in order, and put on the devices in the background.

    Args:
        make_batch: from an index to a batch; it is pickled where there are workers.
        indices: of the batches, with step 1.
        workers: processes that make them; 0 makes them in this one. All cores are used in any case: each process has
            its share of as many threads.
        prefetch: batches that each process holds ready.
        put: what puts a batch on the devices; called in a thread.

    Attributes:
        next: the index of the batch that comes next.

    Raises:
        DataError: Grain is not installed; while iterating, what `make_batch` raises.
        StreamError: while iterating, a worker process ended, or reading failed otherwise.
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
            if not flags.FLAGS.is_parsed():  # absl's own, which are not this program's, and which Grain looks at
                flags.FLAGS.mark_as_parsed()
            _start_tracker()
            options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)
            batches = batches.mp_prefetch(options, worker_init_fn=_start_worker)
        batches = grain.experimental.ThreadPrefetchIterDataset(batches.map(put), prefetch_buffer_size=ON_DEVICES)
        # What is started here inherits the mask: a signal to all processes, such as Ctrl-C, is the run's to handle.
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
        except Exception as error:  # Grain's own, of a process that was killed, and the system's
            raise StreamError(
                f"reading the data stopped ({one_line(error)}): run the same command again, or with another "
                "--config.dataset.workers"
            ) from error
        self.next += 1
        return batch

    def close(self) -> None:
        """Ends threads and processes."""
        self._iterator.close()
        self._iterator = iter(())  # Grain's holds a batch in shared memory, which would outlive this process


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_tracker() -> None:
    """Starts the process that clears away what a killed worker left in shared memory, silently."""
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = "ignore"
    try:
        resource_tracker.ensure_running()
    finally:
        os.environ.pop("PYTHONWARNINGS")
        if before is not None:
            os.environ["PYTHONWARNINGS"] = before


def _start_worker(index: int, count: int) -> None:
    """Runs first in a worker process, whose signals are blocked: only its parent ends it."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)  # Grain's worker would wait for ever for a parent that was killed

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
    """Opens a data set that is to be streamed.

    Args:
        name: as for sources.load_dataset, and "imagenet2012".
        data_dir: likewise.
        image_size: height and width that photographs are brought to; 0 is 224 for imagenet2012.
        num_classes: the number of classes that the data must have; 0 takes what they have.
        in_memory: "never" streams; "auto" streams imagenet2012, what is cropped while decoding, and a folder whose
            images would take more than FOLDER_BYTES.
        augment: of training images; CROP among them crops.
        strict: see StreamedDataset.
        validation: as for sources.load_dataset. The same photographs are held out, where all of them decode.
        seed: fixes which these are.
        class_names: see list_image_folder.

    Returns:
        The data set; None if it is to be held in memory.

    Raises:
        DataError: the data set is missing, unreadable, of other classes, or too small for `validation`.
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
                f"{listing.root} is streamed: set --config.dataset.image_size, which its images are brought to"
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
    if validation and (name != "folder" or is_divided(data_dir)):
        train = dataset.train
        labels = train.labels if isinstance(train, FolderRecords) else None  # TFDS's are not known without reading
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
