"""The data sets that fit in memory, by name: digits, CIFAR from TFDS, image folders, synthetic images."""

import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import io
import pathlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from regnet_flax.data.folder import Split, check_memory, read_image_folder
from regnet_flax.data.folder.listing import is_divided, list_image_folder
from regnet_flax.data.photos import open_image
from regnet_flax.data.tfds import USE_FOLDERS, prepare_tfds
from regnet_flax.errors import DataError, one_line

BATCH = 1000


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set held in memory.

    Attributes:
        name: its key in SOURCES.
        train: the training split.
        test: the test split.
        class_names: the name of each label.
        skipped: "path: reason" for each image file that could not be decoded.
        notes: other remarks about the data, one line each; the first says which directory serves which split.
        validation: the split that is evaluated during training, if it is not the test split.
    """

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    validation: Split | None = None
    notes: tuple[str, ...] = ()

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Height, width and channels."""
        return self.train.images.shape[1:]

    @property
    def evaluated(self) -> str:
        """The split that is evaluated during training: "validation" if there is one, else "test"."""
        return "test" if self.validation is None else "validation"

    def size(self, split: str) -> int:
        """The number of examples of "train", "validation" or "test"."""
        return len(getattr(self, split).labels)

    def images(self, split: str, indices: np.ndarray) -> np.ndarray:
        """Returns some of a split's images: uint8 (N, height, width, channels)."""
        return getattr(self, split).images[indices]

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Returns mean and standard deviation of each channel of the training images; see channel_statistics."""
        return channel_statistics(self.train.images)

    def fingerprint(self) -> str:
        """Returns 16 hex digits that change with the name, the class names, or any image or label of any split."""
        digest = hashlib.blake2b(repr((self.name, self.class_names)).encode(), digest_size=8)
        for split in (self.train, self.test) if self.validation is None else (self.train, self.test, self.validation):
            for array in (split.images, split.labels):
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
    validation: float = 0,
    seed: int = 0,
    class_names: tuple[str, ...] = (),
) -> Dataset:
    """Reads a whole data set into memory.

    Args:
        name: a key of SOURCES.
        data_dir: where TFDS data sets are prepared ("": TFDS's default), or the directory of the image folders.
        image_size: images are resized to this height and width; 0 keeps the data's own size.
        num_classes: the number of classes that the data must have; 0 accepts any. Synthetic data are made with it.
        strict: raise an error for an image file that does not decode, instead of skipping it.
        validation: training images that become the validation split; see hold_out. 0 holds none out.
        seed: determines which these are, and the synthetic images.
        class_names: see list_image_folder.

    Returns:
        The data set, in the same order at each call.

    Raises:
        DataError: the name is unknown, or the data set is missing, unreadable or too large, has other classes, or has
            too few training images for `validation`.
    """
    if name not in SOURCES:
        close = difflib.get_close_matches(name, SOURCES)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise DataError(f"unknown data set {name!r}: {hint}--config.dataset.name is one of {', '.join(SOURCES)}")
    options = {"data_dir": data_dir, "image_size": image_size, "num_classes": num_classes, "strict": strict}
    dataset = SOURCES[name](**options, validation=validation, seed=seed, class_names=class_names)
    check_classes(name, num_classes, len(dataset.class_names))
    if image_size and image_size != dataset.train.images.shape[1]:
        count = len(dataset.train.images) + len(dataset.test.images)
        check_memory(name, count, (image_size, image_size, dataset.train.images.shape[3]))
        train, test = _resize(dataset.train, image_size), _resize(dataset.test, image_size)
        dataset = dataclasses.replace(dataset, train=train, test=test)
    if holds_out(dataset, name, data_dir, validation):
        train = dataset.train
        kept, held = (
            Split(train.images[indices], train.labels[indices])
            for indices in hold_out(name, len(train.labels), validation, seed, train.labels)
        )
        dataset = dataclasses.replace(dataset, train=kept, validation=held)
    return dataset


def check_classes(name: str, num_classes: int, found: int) -> None:
    """Raises DataError if a data set should have `num_classes` classes, 0 for any number, but has `found`."""
    if num_classes not in (0, found):
        raise DataError(
            f"--config.dataset.num_classes={num_classes}, but {name} has {found} classes; "
            "set it to that, or to 0 to take it from the data"
        )


def holds_out(dataset: Any, name: str, data_dir: str, validation: float) -> bool:
    """Whether training images become a validation split: not if there are none, or if a folder divided them itself."""
    return bool(validation and dataset.size("train") and (name != "folder" or is_divided(data_dir)))


def hold_out(
    name: str, size: int, validation: float, seed: int, labels: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Draws the training images to hold out for validation, regardless of their classes.

    Args:
        name: the data set's name, for the message.
        size: the number of its training images.
        validation: how many to hold out, 1 or more; or which fraction of them, above 0 and below 1.
        seed: determines the draw.
        labels: int (size,), the images' labels; None if they are unknown.

    Returns:
        The indices of the images that remain for training, and of those held out, both in the data's order.

    Raises:
        DataError: no image would be held out, or a class would lose all its training images.
    """
    count = round(validation if validation >= 1 else validation * size)
    if not 1 <= count < size:
        raise DataError(
            f"dataset.validation is {validation:.10g}: {name} has {size} training images, and this would hold out "
            f"{count or 'none'}; set a number from 1 to {size - 1}, a fraction such as 0.1, or 0"
        )
    # RandomState's stream is frozen, as for digits; no epoch's order uses this seed.
    order = np.random.RandomState((seed, 2**32 - 1)).permutation(size)
    kept, held = np.sort(order[count:]), np.sort(order[:count])
    if labels is not None and (lost := len(np.unique(labels)) - len(np.unique(labels[kept]))):
        raise DataError(
            f"dataset.validation is {validation:.10g}: it holds out {count} of {name}'s {size} training images, "
            f"including all images of {lost} of the classes; set a smaller one, or add images"
        )
    return kept, held


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Computes each channel's mean and standard deviation, for values divided by 255.

    It sums integers, so the result is exact up to the last rounding for any number of images.

    Args:
        images: uint8 (N, H, W, C), N at least 1.

    Returns:
        The means and the (population) standard deviations, C each.
    """
    counts = np.zeros((images.shape[3], 256), np.int64)
    # bincount uses 8 bytes per value: in chunks, that stays far below the size of the images themselves.
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
        # Pillow expects grey images without a channel axis.
        image = Image.fromarray(split.images[index].squeeze(-1) if images.shape[3] == 1 else split.images[index])
        image = image.resize((size, size), Image.Resampling.BILINEAR)
        images[index] = np.asarray(image).reshape(images.shape[1:])

    with ThreadPoolExecutor() as pool:
        list(pool.map(resize, range(len(images))))
    return Split(images, split.labels)


def _digits(**_) -> Dataset:
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise DataError(
            f"digits come with scikit-learn, which is not installed: pip install scikit-learn, or {USE_FOLDERS}"
        )
    # Not sklearn.datasets.load_digits: importing it takes longer than all other imports together.
    table = np.loadtxt(pathlib.Path(package.origin).parent / "datasets/data/digits.csv.gz", np.uint8, delimiter=",")
    images = np.rint(table[:, :-1].reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    labels = table[:, -1].astype(np.int32)
    # RandomState's stream is frozen, so the split is the same under every version of NumPy.
    train, test = np.split(np.random.RandomState(0).permutation(len(images)), [1437])
    class_names = tuple(str(digit) for digit in range(10))
    return Dataset("digits", Split(images[train], labels[train]), Split(images[test], labels[test]), class_names)


def _folder(
    *, data_dir: str, image_size: int, strict: bool, validation: float, seed: int, class_names: tuple[str, ...], **_
) -> Dataset:
    listing = list_image_folder(data_dir, validation, seed=seed, class_names=class_names)
    splits, skipped, remarks = read_image_folder(listing, image_size, strict)
    notes = listing.uses, *listing.notes, *remarks
    return Dataset("folder", **splits, class_names=listing.class_names, skipped=tuple(skipped), notes=notes)


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
    except Exception as error:  # Each layer below (protobuf, ArrayRecord, Pillow) raises its own exceptions.
        raise DataError(
            f"the copy of {name} in {builder.data_dir} cannot be read ({one_line(error)}); copy or prepare it again"
        ) from error
    return Dataset(name, train, test, class_names)


def _read_source(source: Any) -> Split:
    """Reads a TFDS data source with encoded images, in batches: twice as fast as one by one."""
    images = np.empty((len(source), *source.dataset_info.features["image"].shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    for start in range(0, len(source), BATCH):
        examples = source.__getitems__(range(start, min(start + BATCH, len(source))))
        for index, example in enumerate(examples, start):
            images[index] = np.asarray(open_image(io.BytesIO(example["image"])))
            labels[index] = example["label"]
    return Split(images, labels)


SOURCES: dict[str, Callable[..., Dataset]] = {
    "digits": _digits,
    "cifar10": functools.partial(_tfds, "cifar10"),
    "cifar100": functools.partial(_tfds, "cifar100"),
    "folder": _folder,
    "synthetic": _synthetic,
}

# Known without reading an image: (height, width, channels) and the number of classes.
IMAGES = {
    "digits": ((8, 8, 1), 10),
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
    "imagenet2012": ((224, 224, 3), 1000),
}
