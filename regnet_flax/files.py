"""Helpers for the whole package: atomic writes, JSON, JSON lines, the processor, and durations as text."""

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


def processor_facts() -> dict[str, str]:
    """Returns what Linux says about its first processor, such as "model name" and "flags"; {} on other systems."""
    with contextlib.suppress(OSError):
        first, _, _ = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")
        facts = (line.partition(":") for line in first.splitlines())
        return {name.strip(): value.strip() for name, _, value in facts}
    return {}


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path names cloud storage, such as "gs://bucket/run"."""
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", os.fspath(path)))


def expanded(path: str, field: str) -> pathlib.Path:
    """Returns the path with ~ and ~user replaced.

    Args:
      path: as the user gave it.
      field: the field or flag that gave it, for the message.

    Raises:
      UsageError: there is no such home directory, or the path is not local.
    """
    if is_remote(path):
        raise UsageError(f"{field} is {path!r}: it must be {LOCAL}")
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{field} is {path!r}, and there is no such home directory: write the whole path") from error


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the path of a new file that replaces `path` once it is complete and on the disk.

    If the write fails or is interrupted, the old file stays. The directory is created if needed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        part.touch()
        mode = part.stat().st_mode  # follows the umask, which some libraries ignore when they write files
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
    """Writes the text atomically, as UTF-8; bytes in file names that are not UTF-8 are escaped."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes the value atomically, as JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: pathlib.Path) -> Any:
    """Returns the file's value, or None if there is no such file.

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
    """Returns the objects of a JSON lines file that have a "step"; warns of others, such as a truncated last line."""
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
    """Returns the data set's name for people; for image folders, the folder's name."""
    name = settings["name"]
    return (pathlib.Path(settings["data_dir"]).name or name) if name == "folder" else name


def duration(seconds: float) -> str:
    """Formats a duration, such as "42 s", "3 min 05 s" or "2 h 07 min"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
