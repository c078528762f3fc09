"""Reads image folders, one sub-folder per class, into arrays, with Pillow alone."""

import contextlib
import dataclasses
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from regnet_flax.data.folder.listing import Files, Listing
from regnet_flax.data.photos import read_image
from regnet_flax.errors import DataError, one_line, printable


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
    """Rejects arrays that would leave the machine short of memory.

    Args:
        where: the name of the data, for the message.
        count: number of images.
        shape: (H, W, C) of each image, uint8.

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
    """Returns the free memory in bytes, within a container's limit; a huge number if the system does not tell."""
    try:
        with open("/proc/meminfo", encoding="utf-8") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        free = sys.maxsize
    return min(free, container_memory())


def container_memory(proc: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> int:
    """Returns the bytes that the limits of this process's control groups leave free; a huge number without limits.

    Args:
        proc: the file that names the groups.
        root: the directory of the groups: of version 2, or of version 1 with a directory for memory.
    """
    try:
        groups = [line.split(":", 2) for line in Path(proc).read_text(encoding="utf-8").splitlines()]
    except OSError:
        return sys.maxsize
    free = sys.maxsize
    for _, controllers, group in groups:
        if controllers not in ("", "memory"):
            continue
        top = Path(root) / controllers
        names = ("max", "current") if not controllers else ("limit_in_bytes", "usage_in_bytes")
        place = top / group.lstrip("/")
        # Inside a container, the top directory may be the group's own.
        for directory in (place, *(above for above in place.parents if above.is_relative_to(top))):
            with contextlib.suppress(OSError, ValueError, KeyError):  # no such directory, or no limit: "max"
                limit, used = (int((directory / f"memory.{name}").read_text(encoding="utf-8")) for name in names)
                stat = (directory / "memory.stat").read_text(encoding="utf-8")
                cache = int(dict(line.split() for line in stat.splitlines() if line)["inactive_file"])
                free = min(free, max(0, limit - used + cache))
    return free


def read_image_folder(listing: Listing, image_size: int, strict: bool) -> tuple[dict[str, Split], list[str], list[str]]:
    """Reads the images of a folder.

    Args:
        listing: the folder's listing.
        image_size: images are resized to this height and width; 0 keeps their size, which must be the same for all.
        strict: raise an error for an image that does not decode, instead of skipping it.

    Returns:
        The splits (RGB) by name, "path: reason" for each skipped image, and the applicable lines of photos.REMARKS.

    Raises:
        DataError: there are no usable images, or images differ in size.
    """
    paths = [path for classes in listing.splits.values() for files in classes.values() for path in files]
    size = (image_size, image_size) if image_size else _first_size(listing.root, paths)
    check_memory(str(listing.root), len(paths), (size[1], size[0], 3))
    splits, skipped, remarks = {}, [], []
    for split, classes in listing.splits.items():
        splits[split], reasons = _decode_split(classes, listing.class_names, size, bool(image_size), strict, remarks)
        skipped += reasons
    return splits, skipped, sorted(set(remarks))


def _first_size(root: Path, paths: list[str]) -> tuple[int, int]:
    """Returns (width, height) of the first image that decodes."""
    for path in paths:
        # Reading the splits will report those that do not decode.
        with contextlib.suppress(Exception):
            return read_image(path).size
    raise DataError(f"{root}: none of the {len(paths)} image files decodes; check that they are images")


def _decode_split(
    files: Files,
    class_names: tuple[str, ...],
    size: tuple[int, int],
    resize: bool,
    strict: bool,
    remarks: list[str],
) -> tuple[Split, list[str]]:
    """Decodes the files into one array; returns the split, and "path: reason" for each skipped file."""
    paths = [path for names in files.values() for path in names]
    labels = np.array([class_names.index(name) for name in files for _ in files[name]], np.int32)
    images = np.empty((len(paths), size[1], size[0], 3), np.uint8)

    def decode(index: int) -> str:
        try:
            image = read_image(paths[index], remarks)
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
