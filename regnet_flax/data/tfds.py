"""TFDS data sets prepared on disk as ArrayRecord; downloads and prepares missing ones."""

import io
import os
import threading
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from regnet_flax.errors import DataError, one_line

CONNECT_SECONDS = 10.0
MANUAL = {"imagenet2012": ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")}
INSTALL = 'pip install "regnet-flax[tfds]"'
USE_FOLDERS = "train from image folders, which need no TFDS, with --config configs/folder.py"


def prepare_tfds(name: str, data_dir: str) -> Any:
    """Opens a TFDS data set prepared as ArrayRecord; downloads and prepares it first if it is missing.

    Args:
        name: the data set's name in TFDS.
        data_dir: the directory that holds TFDS data sets; "" is TFDS's default.

    Returns:
        A `tfds.core.DatasetBuilder` whose `as_data_source(file_format="array_record")` works.

    Raises:
        DataError: it is missing and cannot be downloaded, is damaged or has another format, or TFDS is not installed.
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
        # Built from its files: a builder from TFDS's code, as in tfds.data_source, does not see formats that
        # convert_format added to a copy.
        builder = tfds.builder_from_directory(directory)
    except DataError:
        raise
    except ImportError as error:
        raise DataError(
            f"{name} is read with TensorFlow Datasets ({one_line(error)}): {INSTALL}, or {USE_FOLDERS}"
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
            "(the tfds command also needs pip install apache-beam mlcroissant, best in a separate environment)"
        )
    return builder


def _download(builder: Any) -> None:
    """Downloads and prepares; without a network, TFDS itself would try for minutes and end in a traceback."""
    name, directory = builder.name, builder.data_path
    if directory.exists():
        # TFDS considers a data set prepared once the directory exists.
        raise DataError(f"{directory} has no dataset_info.json, so the copy is incomplete: copy it again, or delete it")
    if find_spec("tensorflow") is None:
        raise DataError(
            f"{name} is not in {directory}, and only TensorFlow prepares it, which is not installed: {INSTALL}, "
            f"copy one prepared elsewhere to {directory}, or {USE_FOLDERS}"
        )
    if name in MANUAL:
        _prepare_manual(builder)
        return
    ways = (
        f"prepare it on a machine with a network (tfds.builder({name!r}, file_format='array_record')"
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
    """Prepares a data set whose archives only registered users can download."""
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
            "check that they are complete and that there is room"
        ) from error


def _unreachable(url: str) -> str:
    """Returns why there is no answer from a URL within CONNECT_SECONDS, "" if there is one."""
    # TFDS downloads with it, so it uses the same proxies and certificates.
    import requests

    reason = [f"no answer in {CONNECT_SECONDS:g} s"]

    def connect() -> None:
        try:
            requests.head(url, timeout=CONNECT_SECONDS)
            reason[0] = ""
        except (OSError, ValueError) as error:  # All exceptions of requests are OSErrors.
            reason[0] = type(error).__name__

    # Looking up the host's name has no timeout; a daemon thread can be abandoned, even when the program ends.
    thread = threading.Thread(target=connect, name="connect", daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    return reason[0]


class TfdsRecords:
    """A split of a TFDS data set prepared as ArrayRecord; TFDS leaves its images encoded."""

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
        except Exception as error:  # Each layer below (protobuf, ArrayRecord) raises its own exceptions.
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
