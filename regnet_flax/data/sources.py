"""The data sets that fit in memory, by name: digits, CIFAR from TFDS, image folders, synthetic images."""

import dataclasses
import difflib
import functools
import hashlib
import io
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from regnet_flax.data.image_folder import DataError, Split, check_memory, read_image_folder
from regnet_flax.text import one_line

CONNECT_SECONDS = 10.0
BATCH = 1000
MANUAL = {"imagenet2012": ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")}
USE_FOLDERS = "train from image folders, which need only Pillow, with --config configs/folder.py"


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set held in memory.

    Attributes:
        name: its key in SOURCES.
        train: the training split.
        test: the test split.
        class_names: the name of each label.
        skipped: "path: reason" of each image file that could not be decoded.
    """

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Height, width and channels."""
        return self.train.images.shape[1:]

    @property
    def train_size(self) -> int:
        """Training examples."""
        return len(self.train.labels)

    @property
    def test_size(self) -> int:
        """Test examples."""
        return len(self.test.labels)

    def test_images(self, indices: np.ndarray) -> np.ndarray:
        """Some of the test images, uint8 (N, height, width, channels)."""
        return self.test.images[indices]

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel of the training images; see channel_statistics."""
        return channel_statistics(self.train.images)

    def fingerprint(self) -> str:
        """Returns 16 hex digits that change with the name, the class names, or any image or label of either split."""
        digest = hashlib.blake2b(repr((self.name, self.class_names)).encode(), digest_size=8)
        for array in (self.train.images, self.train.labels, self.test.images, self.test.labels):
            digest.update(repr((array.shape, array.dtype.str)).encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def load_dataset(
    name: str,
    *,
    data_dir: str = "",
    image_size: int = 0,
    num_classes: int = 0,
    strict: bool = False,
    seed: int = 0,
) -> Dataset:
    """Reads a whole data set into memory.

    Args:
        name: a key of SOURCES.
        data_dir: where TFDS data sets are prepared ("": TFDS's default), or the directory of the image folders.
        image_size: images are resized to this height and width; 0 keeps the data's own size.
        num_classes: the number of classes that the data must have; 0 takes what they have. Synthetic data get it.
        strict: an image file that does not decode is an error instead of being skipped.
        seed: fixes the synthetic images.

    Returns:
        The data set, in the same order at each call.

    Raises:
        DataError: the name is unknown, or the data set is missing, unreadable, too large, or of other classes.
    """
    if name not in SOURCES:
        close = difflib.get_close_matches(name, SOURCES)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise DataError(f"unknown data set {name!r}: {hint}--config.dataset.name is one of {', '.join(SOURCES)}")
    dataset = SOURCES[name](data_dir=data_dir, image_size=image_size, num_classes=num_classes, strict=strict, seed=seed)
    if num_classes and num_classes != len(dataset.class_names):
        raise DataError(
            f"--config.dataset.num_classes={num_classes}, but {name} has {len(dataset.class_names)} classes; "
            "set it to that, or to 0 to take it from the data"
        )
    if image_size and image_size != dataset.train.images.shape[1]:
        count = len(dataset.train.images) + len(dataset.test.images)
        check_memory(name, count, (image_size, image_size, dataset.train.images.shape[3]))
        train, test = _resize(dataset.train, image_size), _resize(dataset.test, image_size)
        dataset = dataclasses.replace(dataset, train=train, test=test)
    return dataset


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Computes each channel's mean and standard deviation, of values divided by 255.

    The sums are of integers, so the result is exact up to the last rounding, whatever the number of images.

    Args:
        images: uint8 (N, H, W, C), N at least 1.

    Returns:
        The means and the (population) standard deviations, C each.
    """
    counts = np.zeros((images.shape[3], 256), np.int64)
    # bincount makes 8 bytes of each value: in chunks, that never comes near the size of the images themselves.
    step = max(1, 2**20 // images[0].size)
    for start in range(0, len(images), step):
        for channel, count in enumerate(counts):
            count += np.bincount(images[start : start + step, ..., channel].ravel(), minlength=256)
    means, stds = [], []
    for count in counts.tolist():
        total = sum(count)
        first = sum(n * value for value, n in enumerate(count))
        second = sum(n * value**2 for value, n in enumerate(count))
        means.append(first / (255 * total))
        stds.append((total * second - first**2) ** 0.5 / (255 * total))
    return tuple(means), tuple(stds)


def _resize(split: Split, size: int) -> Split:
    images = np.empty((len(split.images), size, size, split.images.shape[3]), np.uint8)

    def resize(index: int) -> None:
        # Pillow takes grey images without a channel axis.
        image = Image.fromarray(split.images[index].squeeze(-1) if images.shape[3] == 1 else split.images[index])
        image = image.resize((size, size), Image.Resampling.BILINEAR)
        images[index] = np.asarray(image).reshape(images.shape[1:])

    with ThreadPoolExecutor() as pool:
        list(pool.map(resize, range(len(images))))
    return Split(images, split.labels)


def _digits(**_) -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            f"digits come with scikit-learn, which is not installed: pip install scikit-learn, or {USE_FOLDERS}"
        ) from error
    digits: Any = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int32)
    # RandomState's stream is frozen, so that the split is the same under every version of NumPy.
    train, test = np.split(np.random.RandomState(0).permutation(len(images)), [1437])
    class_names = tuple(str(digit) for digit in range(10))
    return Dataset("digits", Split(images[train], labels[train]), Split(images[test], labels[test]), class_names)


def _folder(*, data_dir: str, image_size: int, strict: bool, **_) -> Dataset:
    return Dataset("folder", *read_image_folder(data_dir, image_size, strict))


def _synthetic(*, image_size: int, num_classes: int, seed: int, **_) -> Dataset:
    shape, num_classes = (image_size or 32, image_size or 32, 3), num_classes or 10
    check_memory("synthetic", 1024 + 256, shape)
    random = np.random.default_rng(seed)
    train, test = (
        Split(random.integers(0, 256, (count, *shape), np.uint8), np.arange(count, dtype=np.int32) % num_classes)
        for count in (1024, 256)
    )
    return Dataset("synthetic", train, test, tuple(str(label) for label in range(num_classes)))


def _tfds(name: str, *, data_dir: str, **_) -> Dataset:
    builder = prepare_tfds(name, data_dir)
    import tensorflow_datasets as tfds

    try:
        sources: Any = builder.as_data_source(
            decoders={"image": tfds.decode.SkipDecoding()}, file_format=tfds.core.FileFormat.ARRAY_RECORD
        )
        class_names = tuple(builder.info.features["label"].names)
        train, test = _read_source(sources["train"]), _read_source(sources["test"])
    except Exception as error:  # Each layer below (protobuf, ArrayRecord, Pillow) raises its own kinds.
        raise DataError(
            f"the copy of {name} in {builder.data_dir} cannot be read ({one_line(error)}); copy or prepare it again"
        ) from error
    return Dataset(name, train, test, class_names)


def _read_source(source: Any) -> Split:
    """Reads a TFDS data source whose images are not decoded; in batches, twice as fast as one by one."""
    images = np.empty((len(source), *source.dataset_info.features["image"].shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    for start in range(0, len(source), BATCH):
        examples = source.__getitems__(range(start, min(start + BATCH, len(source))))
        for index, example in enumerate(examples, start):
            images[index] = np.asarray(Image.open(io.BytesIO(example["image"])))
            labels[index] = example["label"]
    return Split(images, labels)


def prepare_tfds(name: str, data_dir: str) -> Any:
    """Opens a TFDS data set prepared in ArrayRecord form; downloads and prepares it first where it is missing.

    Args:
        name: the data set's name in TFDS.
        data_dir: the directory that holds TFDS data sets; "" is TFDS's default.

    Returns:
        A `tfds.core.DatasetBuilder` whose `as_data_source(file_format="array_record")` works.

    Raises:
        DataError: it is missing and cannot be downloaded, is damaged or in another form, or TFDS is not installed.
    """
    root = Path(data_dir).expanduser() if data_dir else None
    if root and not root.is_dir():
        raise DataError(
            f"--config.dataset.data_dir={data_dir} is not a directory; name the one that holds {name}/, or create it "
            f"to have {name} downloaded into it"
        )
    try:
        import tensorflow_datasets as tfds

        builder = tfds.builder(name, data_dir=root)
        directory = builder.data_path
        if not (directory / "dataset_info.json").exists():
            _download(builder)
        # From its files: a builder from TFDS's code, as tfds.data_source makes, does not see the formats that
        # convert_format has added to a copy.
        builder = tfds.builder_from_directory(directory)
    except DataError:
        raise
    except ImportError as error:
        raise DataError(
            f"{name} is read with TensorFlow Datasets ({one_line(error)}): pip install tensorflow-datasets "
            f"tensorflow-cpu importlib_resources, or {USE_FOLDERS}"
        ) from error
    except Exception as error:
        raise DataError(
            f"TFDS's copy of {name} in {root or 'its default directory'} cannot be opened ({one_line(error)}); "
            "copy or prepare it again"
        ) from error
    formats = sorted(form.value for form in builder.info.available_file_formats())
    if "array_record" not in formats:
        raise DataError(
            f"{directory} holds {name} as {', '.join(formats)} only, which cannot be read in any order: convert it "
            f"with tfds convert_format --dataset_version_dir={directory} --out_file_format=array_record "
            "(the tfds command also needs pip install apache-beam mlcroissant, best in an environment of its own)"
        )
    return builder


def _download(builder: Any) -> None:
    """Downloads and prepares; with no network TFDS alone tries for minutes and ends in a traceback."""
    name, directory = builder.name, builder.data_path
    if directory.exists():
        # TFDS takes the directory's existence for a prepared data set.
        raise DataError(f"{directory} has no dataset_info.json, so the copy is incomplete: copy it again, or delete it")
    if name in MANUAL:
        _prepare_manual(builder)
        return
    ways = (
        f"prepare it where there is a network (tfds.builder({name!r}, file_format='array_record')"
        f".download_and_prepare()) and copy it to {directory}, name another place with --config.dataset.data_dir=DIR, "
        f"or {USE_FOLDERS}"
    )
    # CIFAR's home page is on the host that serves its archives.
    url = builder.info.homepage
    if reason := _unreachable(url):
        raise DataError(
            f"{name} is not in {directory} and {urlsplit(url).hostname} cannot be reached ({reason}): {ways}"
        )
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        raise DataError(f"{name} is not in {directory} and its download failed ({one_line(error)}): {ways}") from error


def _prepare_manual(builder: Any) -> None:
    """Prepares a data set whose archives only registered users are given."""
    directory = builder.data_path
    archives = directory.parents[1] / "downloads" / "manual"  # where TFDS looks for them
    if missing := [name for name in MANUAL[builder.name] if not (archives / name).exists()]:
        raise DataError(
            f"{builder.name} is not in {directory}, and {urlsplit(builder.info.homepage).hostname} gives it to "
            f"registered users only: copy one prepared by TFDS (file_format='array_record') there, put "
            f"{' and '.join(missing)} into {archives} to have it prepared, or name another place with "
            "--config.dataset.data_dir=DIR"
        )
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        raise DataError(
            f"{builder.name} could not be prepared in {directory} from the archives in {archives} ({one_line(error)}): "
            "check that they are whole and that there is room"
        ) from error


def _unreachable(url: str) -> str:
    """Returns why there is no answer from a URL within CONNECT_SECONDS, "" if there is one."""
    # What TFDS downloads with, so that it takes the same proxies and certificates.
    import requests

    reason = [f"no answer in {CONNECT_SECONDS:g} s"]

    def connect() -> None:
        try:
            requests.head(url, timeout=CONNECT_SECONDS)
            reason[0] = ""
        except (OSError, ValueError) as error:  # All of requests' own are OSErrors.
            reason[0] = type(error).__name__

    # A look-up of the host's name knows no timeout: a daemon thread can be left behind, even when the program ends.
    thread = threading.Thread(target=connect, name="connect", daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    return reason[0]


SOURCES: dict[str, Callable[..., Dataset]] = {
    "digits": _digits,
    "cifar10": functools.partial(_tfds, "cifar10"),
    "cifar100": functools.partial(_tfds, "cifar100"),
    "folder": _folder,
    "synthetic": _synthetic,
}

# What is known without reading any: (height, width, channels) and the number of classes.
IMAGES = {
    "digits": ((8, 8, 1), 10),
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
    "imagenet2012": ((224, 224, 3), 1000),
}
