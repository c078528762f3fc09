"""A directory in a bucket, by fsspec: lists, reads and writes objects, and explains failures in one line."""

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

# Maps a URL's scheme to the extra that reads it; memory:// is fsspec's own, for tests.
EXTRAS = {"gs": "gcs", "s3": "s3", "memory": ""}
_URL = re.compile(rf"({'|'.join(EXTRAS)}):/+(.*)", re.DOTALL)
_LOGIN = {"gs": "`gcloud auth application-default login`", "s3": "`aws configure`", "memory": ""}
# The fields that tell an object's version; each filesystem has some of them.
_VERSIONS = ("generation", "ETag", "etag", "LastModified", "created")


def in_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether a path is gs://… or s3://…, also with one slash, as pathlib leaves it."""
    return _URL.fullmatch(os.fspath(path)) is not None


@functools.cache
def filesystem(scheme: str) -> Any:
    """Returns fsspec's filesystem for a scheme. It caches no listings, and its libraries do not log retries."""
    import fsspec

    for name in ("gcsfs", "s3fs", "aiobotocore", "botocore"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True)


class Object(NamedTuple):
    """An object's entry in a listing.

    Attributes:
      size: in bytes.
      version: changes whenever the object is written.
    """

    size: int
    version: str


class Bucket:
    """A directory in a bucket. Buckets promise to write each object whole or not at all.

    Args:
      path: gs://… or s3://…
      said: the URL for messages; by default, the path's.

    Attributes:
      url: the path with both slashes.

    Raises:
      PlaceError: credentials, permission, the bucket or the network are missing. Every method raises it, with a message
        of one line.
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
        """The directory that contains this one."""
        return Bucket(self.url.rpartition("/")[0])

    def below(self, name: str) -> Bucket:
        """Returns a directory in this one."""
        return Bucket(f"{self.url}/{name}", self._said)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except PlaceError:
            raise
        except Exception as error:  # each cloud's library has its own exceptions
            raise PlaceError(f"{self._said} {self._reason(error)}") from error

    def _reason(self, error: Exception) -> str:
        names = {kind.__name__ for cause in (error, error.__cause__) for kind in type(cause).__mro__}
        if isinstance(error, ImportError):
            return f"needs the extra [{EXTRAS[self._scheme]}]: pip install 'regnet-flax[{EXTRAS[self._scheme]}]'"
        if any("Credential" in name for name in names):
            return f"cannot be used without credentials: log in, for example with {_LOGIN[self._scheme]}"
        if isinstance(error, PermissionError):
            return f"cannot be used without permission ({one_line(error)}): ask for it, or run {_LOGIN[self._scheme]}"
        if isinstance(error, FileNotFoundError):
            bucket = self._root.partition("/")[0]
            return f"cannot be found: check that there is a bucket {bucket}, and what it contains"
        return f"cannot be used ({one_line(error)}): check the network and the disk"

    def _path(self, name: str) -> str:
        return "/".join(filter(None, (self._root, name)))

    def list(self) -> dict[str, Object]:
        """Returns all objects in and below the directory, by their names in it; "" is the URL itself, if an object."""
        with self._explained():
            found = self._files.find(self._root, detail=True)
        objects = {}
        for path, info in found.items():
            path = path.lstrip("/")
            if path.endswith("/") or not (path == self._root or path.startswith(f"{self._root}/")):
                continue  # a cloud console marks an empty directory this way
            name = path[len(self._root) :].lstrip("/")
            if name and any(part in ("", ".", "..") for part in name.split("/")):
                raise PlaceError(f"{self.url} has an object whose name no file can have ({name!r}): rename it")
            version = " ".join(str(info[key]) for key in _VERSIONS if info.get(key) is not None)
            objects[name] = Object(int(info["size"]), version)
        return objects

    def names(self) -> list[str]:
        """Returns the names of the objects and directories directly in the directory."""
        with self._explained():
            try:
                found = self._files.ls(self._root, detail=False)
            except FileNotFoundError:
                return []
        return [path.rstrip("/").rpartition("/")[2] for path in found]

    def read(self, name: str) -> bytes | None:
        """Returns an object's content; None if there is no such object."""
        with self._explained():
            try:
                return self._files.cat_file(self._path(name))
            except FileNotFoundError:
                return None

    def write(self, contents: Mapping[str, bytes]) -> None:
        """Writes objects, and replaces those that exist."""
        if contents:
            with self._explained():
                self._files.pipe({self._path(name): content for name, content in contents.items()})

    def create(self, name: str, content: bytes) -> bool:
        """Writes an object unless one of that name exists, and returns whether it did. Of two callers, one does."""
        with self._explained():
            try:
                self._files.pipe_file(self._path(name), content, mode="create")
            except FileExistsError:
                return False
        return True

    def send(self, files: Mapping[str, pathlib.Path]) -> None:
        """Writes files to objects."""
        if files:
            with self._explained():
                self._files.put([str(path) for path in files.values()], [self._path(name) for name in files])

    def fetch(self, files: Mapping[str, pathlib.Path]) -> None:
        """Writes objects to files."""
        for path in files.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        if files:
            with self._explained():
                self._files.get([self._path(name) for name in files], [str(path) for path in files.values()])

    def delete(self, names: Iterable[str]) -> None:
        """Deletes those of the objects that exist."""
        with self._explained():
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    self._files.rm_file(self._path(name))
