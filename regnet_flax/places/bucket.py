"""A directory in a bucket, by fsspec: lists, reads and writes objects, and says in one line what is wrong with it."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from regnet_flax.errors import PlaceError, one_line

# From the scheme of a URL to the extra that reads it; memory:// is fsspec's own, for tests.
EXTRAS = {"gs": "gcs", "s3": "s3", "memory": ""}
_URL = re.compile(rf"({'|'.join(EXTRAS)}):/+(.*)", re.DOTALL)
_LOGIN = {"gs": "`gcloud auth application-default login`", "s3": "`aws configure`", "memory": ""}
# What a filesystem says of an object's version, whichever of them it has.
_VERSIONS = ("generation", "ETag", "etag", "LastModified", "created")


def in_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether a path is gs://… or s3://…; pathlib leaves one slash of the two."""
    return _URL.fullmatch(os.fspath(path)) is not None


@functools.cache
def filesystem(scheme: str) -> Any:
    """Fsspec's for a scheme. It lists anew each time, and logs nothing itself, such as a traceback for each retry."""
    import fsspec

    for name in ("gcsfs", "s3fs", "aiobotocore", "botocore"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True)


class Object(NamedTuple):
    """An object as it is listed.

    Attributes:
      size: in bytes.
      version: changes whenever the object is written.
    """

    size: int
    version: str


class Bucket:
    """A directory in a bucket. Each object is written whole or not at all, which is what buckets promise.

    Args:
      path: gs://… or s3://…
      said: the URL that messages name; by default this one.

    Attributes:
      url: the path with both slashes.

    Raises:
      PlaceError: by every method: credentials, permission, bucket or network are missing; the message is one line.
    """

    def __init__(self, path: str | os.PathLike[str], said: str = ""):
        match = _URL.fullmatch(os.fspath(path))
        assert match is not None
        self._scheme, self._root = match[1], match[2].strip("/")
        self.url = f"{self._scheme}://{self._root}"
        self._said = said or self.url
        if not self._root:
            raise PlaceError(f"{self.url} names no bucket: write {self.url}BUCKET/DIRECTORY")

    @property
    def _files(self) -> Any:
        return filesystem(self._scheme)

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self._root.rpartition("/")[2]

    @property
    def parent(self) -> Bucket:
        """The directory that this is in."""
        return Bucket(self.url.rpartition("/")[0])

    def below(self, name: str) -> Bucket:
        """A directory in this one."""
        return Bucket(f"{self.url}/{name}", self._said)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except PlaceError:
            raise
        except Exception as error:  # each cloud's library has its own
            raise PlaceError(f"{self._said} {self._reason(error)}") from error

    def _reason(self, error: Exception) -> str:
        names = {kind.__name__ for cause in (error, error.__cause__) for kind in type(cause).__mro__}
        if isinstance(error, ImportError):
            return f"needs the extra [{EXTRAS[self._scheme]}]: pip install 'regnet-flax[{EXTRAS[self._scheme]}]'"
        if any("Credential" in name for name in names):
            return f"cannot be used without credentials: give them, as with {_LOGIN[self._scheme]}"
        if isinstance(error, PermissionError):
            return f"cannot be used without permission ({one_line(error)}): check it, or {_LOGIN[self._scheme]}"
        if isinstance(error, FileNotFoundError):
            bucket = self._root.partition("/")[0]
            return f"cannot be found: check that there is a bucket {bucket} and what is in it"
        return f"cannot be used ({one_line(error)}): check the network and the disk"

    def _path(self, name: str) -> str:
        return "/".join(filter(None, (self._root, name)))

    def list(self) -> dict[str, Object]:
        """All objects in and below the directory, by their names in it; under "" the URL itself, if it is an object."""
        with self._explained():
            found = self._files.find(self._root, detail=True)
        objects = {}
        for path, info in found.items():
            path = path.lstrip("/")
            if path.endswith("/") or not (path == self._root or path.startswith(f"{self._root}/")):
                continue  # a console's mark of an empty directory
            name = path[len(self._root) :].lstrip("/")
            if name and any(part in ("", ".", "..") for part in name.split("/")):
                raise PlaceError(f"{self.url} has an object that no file can be named like: {name!r}")
            version = " ".join(str(info[key]) for key in _VERSIONS if info.get(key) is not None)
            objects[name] = Object(int(info["size"]), version)
        return objects

    def read(self, name: str) -> bytes | None:
        """An object's content; None where there is none."""
        with self._explained():
            try:
                return self._files.cat_file(self._path(name))
            except FileNotFoundError:
                return None

    def write(self, contents: Mapping[str, bytes]) -> None:
        """Writes objects, over what was there."""
        if contents:
            with self._explained():
                self._files.pipe({self._path(name): content for name, content in contents.items()})

    def create(self, name: str, content: bytes) -> bool:
        """Writes an object if there is none of that name, and whether it did; of two that try at once, one does."""
        with self._explained():
            try:
                self._files.pipe_file(self._path(name), content, mode="create")
            except FileExistsError:
                return False
        return True

    def send(self, files: Mapping[str, pathlib.Path]) -> None:
        """Writes objects from files."""
        if files:
            with self._explained():
                self._files.put([str(path) for path in files.values()], [self._path(name) for name in files])

    def fetch(self, files: Mapping[str, pathlib.Path]) -> None:
        """Writes objects into files."""
        for path in files.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        if files:
            with self._explained():
                self._files.get([self._path(name) for name in files], [str(path) for path in files.values()])

    def delete(self, names: Iterable[str]) -> None:
        """Deletes objects, those that are there."""
        with self._explained():
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    self._files.rm_file(self._path(name))
