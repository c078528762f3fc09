"""What several rooms need of files: whole writes, JSON, lines of JSON; and durations as text."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from regnet_flax.errors import UsageError, WorkdirError

LOCAL = "a local path, gs://… or s3://…: copy it there"

logger = logging.getLogger("regnet_flax")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is of a cloud's storage, such as "gs://bucket/run"."""
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", os.fspath(path)))


def expanded(path: str, field: str) -> pathlib.Path:
    """The path with ~ and ~user replaced.

    Args:
      path: as the user gave it.
      field: which gave it, for the message.

    Raises:
      UsageError: there is no such home directory, or the path is no local one.
    """
    if is_remote(path):
        raise UsageError(f"{field} is {path!r}: it must be {LOCAL}")
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{field} is {path!r}, and there is no such home directory: write the whole path") from error


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the path of a new file that takes the place of `path` once it is whole and on the disk.

    If the write fails or is interrupted, the file that was there stays. The directory is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        part.touch()
        mode = part.stat().st_mode  # by the umask, which some libraries that write files pass over
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), mode)
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes all of it or nothing, as UTF-8."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes all of it or nothing."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: pathlib.Path) -> Any:
    """The file's value; None where there is no such file.

    Raises:
      WorkdirError: the file is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise WorkdirError(f"{path} cannot be read ({error}): restore it, or name another --workdir") from error


def read_json_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines that have a "step"; others, such as a last line cut short, are warned of."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    lines = []
    for found in text.splitlines():
        try:
            line = json.loads(found)
            lines.append(line | {"step": int(line["step"])})
        except (ValueError, TypeError, KeyError):
            logger.warning("%s has a damaged line, which is dropped: %.60r", path, found)
    return lines


def runs(pid: int) -> bool:
    """Whether there is a process of that number on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def dataset_title(settings: Mapping[str, Any]) -> str:
    """What people call a config's data set: the folder's name, for images of one's own."""
    name = settings["name"]
    return (pathlib.Path(settings["data_dir"]).name or name) if name == "folder" else name


def duration(seconds: float) -> str:
    """Such as "42 s", "3 min 05 s" or "2 h 07 min"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
