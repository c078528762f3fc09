"""Image folders, one sub-folder per class, read into arrays with Pillow alone."""

import contextlib
import dataclasses
import math
import os
import stat
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps

from regnet_flax.errors import DataError, one_line, printable

# The directories of each split; val/ serves to validate where there is test/ too, and else to test.
DIRECTORIES = {"train": ("train", "Train"), "test": ("test", "Test", "val", "Val"), "validation": ("val", "Val")}
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".avif", ".jp2"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff"),
)


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
    data_dir: str, image_size: int, strict: bool, validation: float = 0
) -> tuple[dict[str, Split], tuple[str, ...], tuple[str, ...]]:
    """Reads an image folder; see split_directories for its layout.

    Args:
        data_dir: the directory that holds the splits.
        image_size: images are resized to this height and width; 0 keeps their size, which must be the same for all.
        strict: an image that does not decode is an error instead of being skipped.
        validation: dataset.validation, which must be 0 where the folder has a validation split.

    Returns:
        The splits (RGB) by name, the class names (the train folders' names, sorted), and "path: reason" for each image
        that was skipped.

    Raises:
        DataError: the folders are laid out otherwise, hold no usable images, or images differ in size.
    """
    root, listed = list_image_folder(data_dir, validation)
    class_names = tuple(listed["train"])
    paths = [path for classes in listed.values() for files in classes.values() for path in files]
    size = (image_size, image_size) if image_size else _first_size(root, paths)
    check_memory(str(root), len(paths), (size[1], size[0], 3))
    splits, skipped = {}, []
    for split, classes in listed.items():
        splits[split], reasons = _decode_split(classes, class_names, size, bool(image_size), strict)
        skipped += reasons
    return splits, class_names, tuple(skipped)


def split_directories(data_dir: str) -> dict[str, Path]:
    """Finds `<data_dir>/{train,Train}`, `{val,Val}` and `{test,Test}`, each with a folder per class.

    Returns:
        The directories of "train", "test" and, of a folder that has both val/ and test/, "validation". With only one of
        the two, that is the test split.

    Raises:
        DataError: there is no directory to train or to test on.
    """
    if not data_dir:
        raise DataError("image folders need a directory: set --config.dataset.data_dir=DIR with DIR/train and DIR/test")
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise DataError(f"{root} is not a directory; set --config.dataset.data_dir to one with train/ and test/ in it")
    found: dict[str, Path] = {}
    for split, names in DIRECTORIES.items():
        directory = next((root / name for name in names if (root / name).is_dir()), None)
        if directory and directory not in found.values():
            found[split] = directory
        elif split != "validation":
            raise DataError(
                f"{root} has no directory {' or '.join(names)}; expected {root / names[0]}/<class>/<images>"
            )
    return found


def list_image_folder(data_dir: str, validation: float = 0) -> tuple[Path, dict[str, dict[str, list[str]]]]:
    """Lists an image folder without reading any image.

    Args:
        data_dir: see read_image_folder.
        validation: likewise.

    Returns:
        The directory, and of each split in split_directories the sorted image paths of each class; the train split's
        classes, sorted, have the labels 0, 1, …

    Raises:
        DataError: see read_image_folder.
    """
    try:
        directories = split_directories(data_dir)
        splits = {split: _list_split(directory) for split, directory in directories.items()}
    except OSError as error:
        raise DataError(f"{data_dir} cannot be listed ({one_line(error)}); check its permissions") from error
    root, train = directories["train"].parent, splits["train"]
    if validation and "validation" in splits:
        raise DataError(
            f"dataset.validation is {validation:.10g}, but {root} has a validation split of its own, "
            f"{directories['validation'].name}/ beside {directories['test'].name}/: set --config.dataset.validation=0"
        )
    if len(train) < 2:
        raise DataError(
            f"{root}: only one class ({', '.join(train)}) to train on; put each class in a folder of its own"
        )
    for split, classes in splits.items():
        if unknown := [name for name in classes if name not in train]:
            raise DataError(
                f"{root}: {split} classes without train images: {', '.join(unknown)}; add or remove these folders"
            )
    return root, splits


def _list_split(directory: Path) -> dict[str, list[str]]:
    """Returns the sorted image paths of each class, classes sorted by name."""
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
                    f"{paths[index]} does not decode ({one_line(error)}); fix or remove it, or set "
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
                raise DataError(
                    f"{folder}: none of its {len(names)} image files decodes; fix them or remove the folder"
                )
    return Split(images, labels), skipped


class FolderRecords:
    """Image files in one folder a class.

    Args:
        root: the directory that holds the splits.
        files: the paths of each class, classes in order.
        labels: of each class.

    Attributes:
        labels: int32 (N,), of each file.
    """

    def __init__(self, root: Path, files: dict[str, list[str]], labels: dict[str, int]):
        self._root = str(root)
        # An array of bytes: a million paths as str would be slow to hand to worker processes, and large in each.
        names = [os.fsencode(os.path.relpath(path, root)) for paths in files.values() for path in paths]
        self._names = np.array(names, dtype=np.bytes_)
        self.labels = np.concatenate([np.full(len(files[name]), labels[name], np.int32) for name in files])

    def __len__(self) -> int:
        return len(self.labels)

    def _path(self, index: int) -> str:
        return os.path.join(self._root, os.fsdecode(self._names[index]))

    def read(self, indices: Sequence[int]) -> list[tuple[str | IO[bytes], int, str]]:
        return [(path := self._path(index), int(self.labels[index]), path) for index in indices]

    def identity(self) -> Iterable[bytes]:
        with ThreadPoolExecutor(32) as pool:  # network file systems answer slowly, but many at once
            sizes = list(pool.map(lambda index: os.path.getsize(self._path(index)), range(len(self))))
        return self._names.tobytes(), self.labels.tobytes(), np.array(sizes, np.int64).tobytes()
