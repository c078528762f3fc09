"""Lists an image folder without reading any image."""

from __future__ import annotations

import collections
import dataclasses
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from regnet_flax.data.photos import HEIC, extensions, reads_heic
from regnet_flax.errors import DataError, one_line, printable

# The directories of each split; val/ is for validation if there is also a test/, and otherwise for testing.
_VAL = ("val", "Val", "valid", "Valid", "validation", "Validation")
DIRECTORIES = {"train": ("train", "Train"), "test": ("test", "Test", *_VAL), "validation": _VAL}
TEST_SHARE = 0.2  # of each class's images, if the folder has no splits and dataset.validation is 0

Files = dict[str, list[str]]  # the sorted paths of each class


@dataclasses.dataclass(frozen=True)
class Listing:
    """The contents of an image folder.

    Attributes:
        root: the directory.
        splits: "train", "test" and perhaps "validation": the sorted image paths of each class.
        class_names: sorted; their labels are 0, 1, …
        uses: one line that says which directory serves which split.
        notes: lines that name the ignored files, and the classes that are not in all splits.
    """

    root: Path
    splits: dict[str, Files]
    class_names: tuple[str, ...]
    uses: str
    notes: tuple[str, ...]


def split_directories(root: Path) -> dict[str, Path]:
    """Finds `<root>/{train,Train}`, `{val,Val,…}` and `{test,Test}`.

    Returns:
        The directories of "train", "test" and, if the folder has both val/ and test/, "validation". If it has only one
        of the two, that one is the test split.
    """
    found: dict[str, Path] = {}
    for split, names in DIRECTORIES.items():
        directory = next((root / name for name in names if (root / name).is_dir()), None)
        if directory and directory not in found.values():
            found[split] = directory
    return found


def list_image_folder(
    data_dir: str, validation: float = 0, *, seed: int = 0, class_names: tuple[str, ...] = ()
) -> Listing:
    """Lists an image folder without reading any image.

    Its layout is `{train,test,val}/<class>/<images>`, including images in folders below a class; or `<class>/<images>`,
    and then a share of each class becomes the test split.

    Args:
        data_dir: the directory that holds the splits.
        validation: dataset.validation, which must be 0 if the folder has a validation split; if it has no splits, the
            share or number of its images that become the test split, 0 for a fifth.
        seed: determines which these are.
        class_names: the classes of a model to evaluate, which needs no training images; by default those of the train
            split.

    Raises:
        DataError: the folder has another layout, or no images.
    """
    if not data_dir:
        raise DataError("image folders need a directory: set --config.dataset.data_dir=DIR with DIR/train and DIR/test")
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise DataError(f"{root} is not a directory; set --config.dataset.data_dir to one with train/ and test/ in it")
    ignored: collections.Counter[str] = collections.Counter()
    try:
        directories = split_directories(root)
        if directories:
            _check_directories(root, directories, needs_train=not class_names)
            splits = {split: _list_split(directory, ignored) for split, directory in directories.items()}
        else:
            splits = _divide(_list_classes(root, ignored), validation or TEST_SHARE, seed, root)
        uses = _say_uses(root, directories, validation)
    except OSError as error:
        raise DataError(f"{data_dir} cannot be listed ({one_line(error)}); check its permissions") from error
    if validation and "validation" in splits:
        raise DataError(
            f"dataset.validation is {validation:.10g}, but {root} has its own validation split, "
            f"{directories['validation'].name}/ beside {directories['test'].name}/: set --config.dataset.validation=0"
        )
    known = class_names or tuple(splits["train"])
    if len(known) < 2:
        hint = "put each class in its own folder"
        if known and split_directories(root / known[0]):
            hint = f"did you mean --config.dataset.data_dir={root / known[0]}?"
        raise DataError(f"{root}: only one class ({', '.join(known)}) to train on; {hint}")
    notes = [f"{root}: {_say_ignored(ignored)}"] if ignored else []
    notes += _one_sided(splits, known, directories, root)
    splits = {split: {name: files[name] for name in files if name in known} for split, files in splits.items()}
    if empty := [split for split, files in splits.items() if not files]:
        raise DataError(f"{root}: no {empty[0]} images of the classes {', '.join(known)}")
    return Listing(root, {"train": {}} | splits, known, printable(uses), tuple(map(printable, notes)))


def is_divided(data_dir: str) -> bool:
    """Whether an image folder has its own splits."""
    return bool(split_directories(Path(data_dir).expanduser()))


def _check_directories(root: Path, directories: dict[str, Path], needs_train: bool) -> None:
    for split in ("train", "test") if needs_train else ("test",):
        if split not in directories:
            names = DIRECTORIES[split]
            raise DataError(
                f"{root} has no directory {' or '.join(names)}; expected {root / names[0]}/<class>/<images>"
            )


def _list_classes(root: Path, ignored: collections.Counter[str]) -> Files:
    """Lists like _list_split, for a directory without splits."""
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    # Splits with other names would look like classes.
    splits = [name for name in folders if name.lower().startswith(("train", "test", "val", "eval"))]
    if splits or not folders:
        found = f"has {', '.join(f'{name}/' for name in splits)}" if splits else "has no folders"
        raise DataError(
            f"{root} {found}: expected train/<class>/<images> and test/<class>/<images> in it, or <class>/<images>"
        )
    return _list_split(root, ignored)


def _divide(classes: Files, share: float, seed: int, root: Path) -> dict[str, Files]:
    """Draws the test images: the same share of each class, and at least one image."""
    splits: dict[str, Files] = {"train": {}, "test": {}}
    share = share if share < 1 else share / sum(map(len, classes.values()))
    for label, (name, files) in enumerate(classes.items()):
        count = max(1, round(share * len(files)))
        if count >= len(files):
            raise DataError(
                f"{root} has no train/ and test/, and {name} has only {len(files)} images to divide: add images, or "
                "set a smaller --config.dataset.validation"
            )
        held = set(np.random.RandomState((seed, label, 2**32 - 1)).permutation(len(files))[:count].tolist())
        splits["test"][name] = [file for index, file in enumerate(files) if index in held]
        splits["train"][name] = [file for index, file in enumerate(files) if index not in held]
    return splits


def _say_uses(root: Path, directories: dict[str, Path], validation: float) -> str:
    if not directories:
        share = validation or TEST_SHARE
        part = f"{share:.10g} images, the same share of each class," if share >= 1 else f"{share:.3g} of each class"
        return f"{root} has no train/ and test/: {part} for testing (dataset.validation), the rest for training"
    uses = ", ".join(f"{split} on {directory.name}/" for split, directory in directories.items())
    unused = [
        f"{entry.name}/"
        for entry in sorted(root.iterdir())
        if entry.is_dir() and not entry.name.startswith(".") and entry not in directories.values()
    ]
    return f"{root}: {uses}" + (f"; not used: {', '.join(unused)}" if unused else "")


def _say_ignored(ignored: collections.Counter[str]) -> str:
    kinds = ", ".join(
        f"{kind} {count:,}" for kind, count in sorted(ignored.items(), key=lambda item: (-item[1], item[0]))
    )
    count = ignored.total()
    hint = ""
    if ignored.keys() & {*HEIC} and not reads_heic():
        hint = '; HEIC needs the extra [heic]: pip install "regnet-flax[heic]"'
    return f"{count:,} file{'s' if count > 1 else ''} ignored: {kinds}{hint}"


def _one_sided(splits: dict[str, Files], known: tuple[str, ...], directories: dict[str, Path], root: Path) -> list[str]:
    """Describes the classes that a split lacks, and those that are not trained on."""
    notes = []
    for split in splits.keys() - {"train"}:
        place = f"{directories[split].name}/" if directories else "the test split"
        if missing := [name for name in known if name not in splits[split]]:
            them = "them" if len(missing) > 1 else "this class"
            notes.append(f"{root}: {place} has no images of {', '.join(missing)}, so it does not evaluate {them}")
        if unknown := {name: len(files) for name, files in splits[split].items() if name not in known}:
            images = sum(unknown.values())
            notes.append(
                f"{root}: {', '.join(unknown)} in {place} {'is' if len(unknown) == 1 else 'are'} not trained on: "
                f"{images} image{'s' if images > 1 else ''} left out"
            )
    return sorted(notes)


def _list_split(directory: Path, ignored: collections.Counter[str]) -> Files:
    """Returns the sorted image paths of each class, classes sorted by name; counts other files by their suffix."""
    suffixes = extensions()
    classes: Files = {}
    # Some systems store é as two characters; both forms mean the same class.
    folders = [(unicodedata.normalize("NFC", folder.name), folder) for folder in directory.iterdir()]
    for name, folder in sorted(folders):
        if name.startswith(".") or not folder.is_dir():
            continue
        others: collections.Counter[str] = collections.Counter()
        files = list(_walk(str(folder), suffixes, others, _above(directory)))
        ignored.update(others)
        if not files:
            left = f": {_say_ignored(others)}" if others else ""
            raise DataError(f"{folder} has no images ({' '.join(suffixes)}){left}; add some, or remove the folder")
        classes[name] = sorted([*classes.get(name, ()), *files])
    if not classes:
        raise DataError(f"{directory} has no class folders; expected {directory}/<class>/<images>")
    return classes


def _above(directory: Path) -> frozenset[str]:
    """Returns the real paths of a directory and its parents: links back to one of them are not followed."""
    real = os.path.realpath(directory)
    return frozenset({real, *map(str, Path(real).parents)})


def _walk(
    folder: str, suffixes: tuple[str, ...], ignored: collections.Counter[str], above: frozenset[str]
) -> Iterator[str]:
    """Yields the images in and below a folder; counts its other files."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_dir(entry):
                yield from _walk(entry.path, suffixes, ignored, above | {real})
            elif entry.name.lower().endswith(suffixes):
                yield entry.path
            else:
                ignored[os.path.splitext(entry.name)[1].lower() or "no suffix"] += 1


def _is_dir(entry: os.DirEntry) -> bool:
    # DirEntry.is_dir raises an error for a symbolic link to itself.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
