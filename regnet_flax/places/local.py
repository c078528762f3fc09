"""This machine's copies of what is in buckets, and how they are updated."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import pathlib
import shutil
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

import platformdirs

from regnet_flax.errors import DataError, PlaceError, one_line
from regnet_flax.files import read_json, write_json
from regnet_flax.places.bucket import Bucket, Object, in_bucket
from regnet_flax.places.lease import last_place
from regnet_flax.places.mirror import CHECKPOINTS, COMMITTED, read_committed

logger = logging.getLogger("regnet_flax")
local_logger = logging.getLogger("regnet_flax.places")  # for messages that keep local paths

# Maps local directories to the URLs that they stand for.
_SHOWN: dict[str, str] = {}


def show(local: pathlib.Path, url: str) -> None:
    """Makes `shown` and all log lines replace a local path by its URL."""
    _SHOWN[str(local)] = url
    logger.addFilter(_show_urls)


def shown(said: str | Exception) -> str:
    """Returns a text in which buckets' URLs replace the local directories that stand for them.

    The message of a PlaceError stays as it is, because it may tell where the local directory is.
    """
    text = str(said)
    if isinstance(said, PlaceError):
        return text
    for local, url in _SHOWN.items():
        text = text.replace(local, url)
    return text


class _ShowUrls(logging.Filter):
    """Applies `shown` to log lines."""

    def filter(self, record: logging.LogRecord) -> bool:
        if _SHOWN:
            record.msg, record.args = shown(record.getMessage()), ()
        return True


_show_urls = _ShowUrls()


@dataclasses.dataclass(frozen=True)
class Local:
    """The local copy of a bucket's directory, or of a single object in it.

    Attributes:
      bucket: the directory or object.
      base: contains `files`, and records about them.
      files: the copy. Its name is the URL's last part, because runs and data sets are named after their directory.
    """

    bucket: Bucket
    base: pathlib.Path
    files: pathlib.Path

    @classmethod
    def of(cls, bucket: Bucket) -> Local:
        name = urllib.parse.quote(bucket.url, safe="")
        if len(name) > 200:
            name = name[:160] + hashlib.sha256(name.encode()).hexdigest()[:16]
        try:
            cache = platformdirs.user_cache_path("regnet_flax")
            base = cache / "buckets" / name
            files = base / "files" / bucket.name
            files.parent.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
            raise PlaceError(
                f"{bucket.url} needs a local directory, which cannot be created ({one_line(error)}): "
                "set XDG_CACHE_HOME to a writable one"
            ) from error
        show(files, bucket.url)
        return cls(bucket, base, files)

    @property
    def index(self) -> pathlib.Path:
        """The file with the version of each fetched object."""
        return self.base / "fetched.json"

    @property
    def links(self) -> pathlib.Path:
        """The directory for `Mirror`'s links."""
        return self.base / "sending"

    @property
    def place(self) -> str:
        """The place of the last run here, or "". If the lease's last holder had another, `files` may be out of date."""
        return str(self._noted.get("place", "")) if self.files.exists() else ""

    @property
    def unsent(self) -> bool:
        """Whether a run may have ended here before it had sent everything."""
        return bool(self._noted.get("unsent"))

    @property
    def _noted(self) -> dict[str, Any]:
        return read_json(self.base / "place.json") or {}

    def note(self, place: str, *, unsent: bool) -> None:
        """Stores `place` and `unsent`."""
        write_json(self.base / "place.json", {"place": place, "unsent": unsent})

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Locks `files` against other processes of this machine that fetch them."""
        import filelock

        with filelock.FileLock(self.base / "fetching.lock"):
            yield


def fetch(path: str | os.PathLike[str], only: str = "") -> pathlib.Path:
    """Updates and returns the local copy of a file or directory in a bucket; returns a local path as it is.

    If the run in the bucket's directory last trained on this machine, the local files are the newest.

    Args:
      path: local, or in a bucket.
      only: the name of a file, to fetch only this one from a directory.

    Raises:
      PlaceError: the bucket cannot be used, or the disk has no room.
    """
    if not in_bucket(path):
        return pathlib.Path(path)
    local = Local.of(Bucket(path))
    with local.alone():
        if not local.place or last_place(local.bucket) != local.place:
            update(local, only)
    return local.files


def fetch_data(data_dir: str, name: str = "") -> str:
    """Fetches a directory of data, or only `name` in it; see `fetch`.

    Raises:
      DataError: it is empty.
    """
    if not in_bucket(data_dir):
        return data_dir
    bucket = Bucket(data_dir).below(name) if name else Bucket(data_dir)
    found = fetch(bucket.url)
    if not found.is_dir() or not any(found.iterdir()):
        raise DataError(
            f"dataset.data_dir is {data_dir!r}: there is nothing in {bucket.url}, check the bucket's contents"
        )
    return str(found.parent if name else found)


def update(local: Local, only: str = "", tries: int = 3) -> None:
    """Makes the local files equal to the bucket's, and deletes those that the bucket does not have.

    Args:
      local: the copy, locked by this process.
      only: see `fetch`; other files are then left alone.
      tries: how often to try if a listed object is gone when it is fetched.
    """
    _set_aside(local)
    objects = {name: found for name, found in _readable(local.bucket).items() if only in ("", name)}
    known = {} if not local.index.exists() else read_json(local.index)
    wanted = {name: o for name, o in objects.items() if not _is_current(local, name, o, known)}
    _check_room(local, wanted)
    if len(wanted) > 1:
        logger.info("%s: fetching %d files, %.3g MB", local.bucket.url, len(wanted), _megabytes(wanted))
    try:
        for start in range(0, len(wanted), 500):
            names = list(wanted)[start : start + 500]
            _fetch_files(local, names)
            known |= {name: wanted[name].version for name in names}
            write_json(local.index, known)
    except PlaceError as error:
        if tries > 1 and isinstance(error.__cause__, FileNotFoundError):  # a run elsewhere deletes old checkpoints
            return update(local, only, tries - 1)
        raise
    if "" in objects and (beside := local.bucket.parent.read(f"{local.bucket.name}.json")):  # as `write_weights` does
        local.files.with_name(f"{local.bucket.name}.json").write_bytes(beside)
    if not only and "" not in objects:
        for path in sorted(local.files.rglob("*"), reverse=True):
            if path.is_dir():
                with contextlib.suppress(OSError):  # it is not empty
                    path.rmdir()
            elif path.relative_to(local.files).as_posix() not in objects:
                path.unlink()
        write_json(local.index, {name: known[name] for name in objects})


def _readable(bucket: Bucket) -> dict[str, Object]:
    """Returns the objects of complete checkpoints, and all others that are not hidden."""
    objects = bucket.list()
    for folder in [name.rpartition("/")[0] for name in objects if name.endswith(f"{CHECKPOINTS}/{COMMITTED}")]:
        whole = {f"{folder}/{file}" for file in read_committed(bucket, folder) or {}}
        objects = {name: o for name, o in objects.items() if not name.startswith(f"{folder}/") or name in whole}
    return {name: o for name, o in objects.items() if not any(part.startswith(".") for part in name.split("/"))}


def _is_current(local: Local, name: str, found: Object, known: dict[str, str]) -> bool:
    path = local.files / name
    return known.get(name) == found.version and path.is_file() and path.stat().st_size == found.size


def _megabytes(objects: dict[str, Object]) -> float:
    return sum(found.size for found in objects.values()) / 1e6


def _check_room(local: Local, wanted: dict[str, Object]) -> None:
    free = shutil.disk_usage(local.base).free / 1e6
    if _megabytes(wanted) > free:
        raise PlaceError(
            f"{local.bucket.url} has {_megabytes(wanted):.3g} MB to fetch into {local.base}, whose disk has "
            f"{free:.3g} MB left: make room, set XDG_CACHE_HOME to another disk, or mount the bucket, as with gcsfuse"
        )


def _fetch_files(local: Local, names: list[str]) -> None:
    parts = {name: (local.files / name).with_name((local.files / name).name + ".part") for name in names}
    local.bucket.fetch(parts)
    for name, part in parts.items():
        part.replace(local.files / name)


def _set_aside(local: Local) -> None:
    """Keeps what a run here had not sent before the run continued on another machine."""
    if local.unsent and local.files.exists():
        aside = local.files.with_name(f"{local.files.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        local.files.rename(aside)
        local.index.unlink(missing_ok=True)
        local.note("", unsent=False)
        local_logger.warning(
            "%s was changed elsewhere: what a run here had not sent is kept in %s", local.bucket.url, aside
        )
