"""Image folders, one sub-folder per class, read into arrays with Pillow alone."""

import contextlib
import dataclasses
import math
import os
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps

from regnet_flax.text import one_line, printable

TRAIN_NAMES = ("train", "Train")
TEST_NAMES = ("test", "Test", "val", "Val")
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".avif", ".jp2"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff"),
)


class DataError(ValueError):
    """A data set is missing, unreadable or not what was asked for.

    The message is one line that names what is wrong, where, and how to mend it.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


@dataclasses.dataclass(frozen=True)
class Split:
    """The examples of one split.

    Attributes:
        images: uint8 (N, H, W, C).
        labels: int32 (N,), indices into the data set's class names.
    """

    images: np.ndarray
    labels: np.ndarray


def check_memory(where: str, count: int, shape: tuple[int, ...]) -> None:
    """Refuses arrays that would leave the machine short of memory.

    Args:
        where: what is being read, for the message.
        count: number of images.
        shape: (H, W, C) of each, uint8.

    Raises:
        DataError: the images would take more than half of the free memory.
    """
    needed, free = count * math.prod(shape), _free_memory()
    if needed > free / 2:
        raise DataError(
            f"{where}: {count:,} images of {'x'.join(map(str, shape))} take {needed / 2**30:.1f} GiB, more than half "
            f"of the {free / 2**30:.1f} GiB of free memory; set a smaller --config.dataset.image_size, or stream "
            "a folder with --config.dataset.in_memory=never"
        )


def _free_memory() -> int:
    """Returns the free memory in bytes, or a huge number where the system does not tell."""
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return sys.maxsize


def open_image(file: str | os.PathLike | IO[bytes]) -> Image.Image:
    """Pillow's Image.open, which refuses images of suspicious size instead of warning of them.

    Raises:
        Image.DecompressionBombError: more than Image.MAX_IMAGE_PIXELS pixels.
        Exception: whatever else Pillow raises for a file that it cannot open.
    """
    # Turning Pillow's warning into an error would do so for the whole process.
    image = Image.open(file)
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        image.close()
        raise Image.DecompressionBombError(
            f"{image.width}x{image.height} pixels, more than PIL.Image.MAX_IMAGE_PIXELS={limit}: shrink the image"
        )
    return image


def read_image(path: str | os.PathLike) -> Image.Image:
    """Reads the first frame of an image file as upright 8-bit RGB.

    Args:
        path: an image of any size and mode; 16-bit grey is scaled to 8 bits, transparency is dropped.

    Returns:
        The decoded image, mode "RGB", turned as its EXIF orientation says.

    Raises:
        Exception: whatever Pillow raises for a file it cannot decode; ValueError for floating-point pixels, and for
            what is no regular file: a named pipe would wait for its other end.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file")
    with open_image(path) as image:
        return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB; see read_image."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range")
    if image.mode.startswith("I"):
        # Pillow's own conversion clips at 255, which turns nearly all of a 16-bit image white.
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) // 256).astype(np.uint8))
    elif image.mode == "P":
        # Straight to RGB, Pillow warns about palettes with transparency.
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def read_image_folder(
    data_dir: str, image_size: int, strict: bool
) -> tuple[Split, Split, tuple[str, ...], tuple[str, ...]]:
    """Reads `<data_dir>/{train,Train}/<class>/*` and `<data_dir>/{test,Test,val,Val}/<class>/*`.

    Args:
        data_dir: the directory that holds both splits.
        image_size: images are resized to this height and width; 0 keeps their size, which must be the same for all.
        strict: an image that does not decode is an error instead of being skipped.

    Returns:
        The train and test splits (RGB), the class names (the train folders' names, sorted), and "path: reason" for each
        image that was skipped.

    Raises:
        DataError: the folders are not laid out as above, hold no usable images, or images differ in size.
    """
    root, train, test = list_image_folder(data_dir)
    class_names = tuple(train)
    paths = [path for split in (train, test) for files in split.values() for path in files]
    size = (image_size, image_size) if image_size else _first_size(root, paths)
    check_memory(str(root), len(paths), (size[1], size[0], 3))
    splits, skipped = [], []
    for split in (train, test):
        arrays, reasons = _decode_split(split, class_names, size, bool(image_size), strict)
        splits.append(arrays)
        skipped += reasons
    return splits[0], splits[1], class_names, tuple(skipped)


def list_image_folder(data_dir: str) -> tuple[Path, dict[str, list[str]], dict[str, list[str]]]:
    """Lists an image folder without reading any image.

    Returns:
        The directory, and the sorted image paths of each class of the train and of the test split; the train split's
        classes, sorted, have the labels 0, 1, …

    Raises:
        DataError: see read_image_folder.
    """
    if not data_dir:
        raise DataError("image folders need a directory: set --config.dataset.data_dir=DIR with DIR/train and DIR/test")
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise DataError(f"{root} is not a directory; set --config.dataset.data_dir to one with train/ and test/ in it")
    try:
        train, test = _list_split(root, TRAIN_NAMES), _list_split(root, TEST_NAMES)
    except OSError as error:
        raise DataError(f"{root} cannot be listed ({one_line(error)}); check its permissions") from error
    if len(train) < 2:
        raise DataError(
            f"{root}: only one class ({', '.join(train)}) to train on; put each class in a folder of its own"
        )
    if unknown := [name for name in test if name not in train]:
        raise DataError(f"{root}: test classes without train images: {', '.join(unknown)}; add or remove these folders")
    return root, train, test


def _list_split(root: Path, names: tuple[str, ...]) -> dict[str, list[str]]:
    """Returns the sorted image paths of each class, classes sorted by name."""
    directory = next((root / name for name in names if (root / name).is_dir()), None)
    if directory is None:
        raise DataError(f"{root} has no directory {' or '.join(names)}; expected {root / names[0]}/<class>/<images>")
    classes = {}
    for folder in sorted(directory.iterdir()):
        if folder.name.startswith(".") or not folder.is_dir():
            continue
        with os.scandir(folder) as entries:
            classes[folder.name] = sorted(
                entry.path
                for entry in entries
                if entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith(".") and not _is_dir(entry)
            )
        if not classes[folder.name]:
            raise DataError(f"{folder} has no images ({' '.join(EXTENSIONS)}); add some, or remove the folder")
    if not classes:
        raise DataError(f"{directory} has no class folders; expected {directory}/<class>/<images>")
    return classes


def _is_dir(entry: os.DirEntry) -> bool:
    # DirEntry.is_dir alone ends in an error for a symbolic link to itself.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _first_size(root: Path, paths: list[str]) -> tuple[int, int]:
    """Returns (width, height) of the first image that decodes."""
    for path in paths:
        # Those that do not decode are named when the splits are read.
        with contextlib.suppress(Exception):
            return read_image(path).size
    raise DataError(f"{root}: none of the {len(paths)} image files decodes; check that they are images")


def _decode_split(
    files: dict[str, list[str]], class_names: tuple[str, ...], size: tuple[int, int], resize: bool, strict: bool
) -> tuple[Split, list[str]]:
    """Decodes the files into one array; returns the split, and "path: reason" for each file left out."""
    paths = [path for names in files.values() for path in names]
    labels = np.concatenate([np.full(len(files[name]), class_names.index(name), np.int32) for name in files])
    images = np.empty((len(paths), size[1], size[0], 3), np.uint8)

    def decode(index: int) -> str:
        try:
            image = read_image(paths[index])
        except Exception as error:  # Pillow's decoders raise nearly anything for a damaged file.
            if strict:
                raise DataError(
                    f"{paths[index]} does not decode ({one_line(error)}); mend or remove it, or set "
                    "--config.dataset.strict=False to leave such images out"
                ) from error
            return printable(f"{paths[index]}: {one_line(error)}")
        if resize:
            image = image.resize(size, Image.Resampling.BILINEAR)
        elif image.size != size:
            raise DataError(
                f"{paths[index]} is {image.width}x{image.height} while others are {size[0]}x{size[1]}; "
                "set --config.dataset.image_size to resize them all"
            )
        images[index] = np.asarray(image)
        return ""

    with ThreadPoolExecutor() as pool:
        reasons = list(pool.map(decode, range(len(paths))))
    skipped = [reason for reason in reasons if reason]
    if skipped:
        kept = np.array([not reason for reason in reasons])
        images, labels = images[kept], labels[kept]
        for name, names in files.items():
            if class_names.index(name) not in labels:
                folder = os.path.dirname(names[0])
                raise DataError(f"{folder}: none of its {len(names)} image files decodes; mend or remove the folder")
    return Split(images, labels), skipped
