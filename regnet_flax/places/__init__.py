"""Buckets, gs://… and s3://…, as if they were local directories. No other package knows about them.

A run works in a local directory in the user's cache. The bucket's contents are fetched into it before the run begins,
and `mirror` sends what the run writes while it trains. So no other code has to change, training does not wait for the
network, and a checkpoint counts only once all of it is in the bucket. Orbax itself can write to gs://. In S3, however,
it renames directories, which is not one operation there, and in neither could a damaged checkpoint be moved aside.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

from regnet_flax.errors import PlaceError, UsageError
from regnet_flax.files import expanded
from regnet_flax.places.bucket import Bucket, in_bucket
from regnet_flax.places.lease import Lease
from regnet_flax.places.local import Local, fetch, fetch_data, local_logger, show, shown, update
from regnet_flax.places.mirror import Mirror, plain_files

__all__ = ["fetch", "fetch_data", "in_bucket", "in_workdir", "local_workdir", "located", "shown", "to_write"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def located(path: str, field: str) -> str:
    """Returns a bucket's URL, or the local path with ~ replaced; see `expanded`."""
    return Bucket(path).url if in_bucket(path) else str(expanded(path, field))


@contextlib.contextmanager
def local_workdir(path: str | os.PathLike[str], *, hold: bool) -> Iterator[pathlib.Path]:
    """Yields the local directory for a workdir: the path itself, or for a bucket a local copy.

    Args:
      path: the workdir.
      hold: whether to train there. Then no other run may use the workdir, and new files are sent all the time.
        Otherwise they are sent at the end.

    Raises:
      WorkdirError: another run holds the workdir.
      UsageError: the path is neither local nor in a bucket.
      PlaceError: the bucket cannot be used at the beginning or at the end. In between, training continues.
    """
    if not in_bucket(path):
        yield expanded(os.fspath(path), "the workdir")
        return
    if hold:
        with _held(Local.of(Bucket(path))) as files:
            yield files
        return
    files = fetch(path)
    files.mkdir(exist_ok=True)
    before = plain_files(files)
    yield files
    changed = [name for name, stat in plain_files(files).items() if before.get(name) != stat]
    try:
        Bucket(path).send({name: files / name for name in changed})
    except PlaceError as error:
        local_logger.warning("%s; the new files are in %s", error, os.path.join(files, ""))


@contextlib.contextmanager
def _held(local: Local) -> Iterator[pathlib.Path]:
    # A new name each time: a run that is killed before it notes its place has not fetched everything.
    place = uuid.uuid4().hex
    lease = Lease(local.bucket, place)
    try:
        with local.alone():
            # If this machine ran last, its copy may have more than the bucket.
            fetched = not local.place or lease.previous != local.place
            if fetched:
                update(local)
            local.index.unlink(missing_ok=True)  # the run changes what was fetched
            local.files.mkdir(exist_ok=True)
            local.note(place, unsent=True)
        mirror = Mirror(local.files, local.bucket, lease, local.links, fetched=fetched)
    except BaseException:
        with contextlib.suppress(PlaceError):
            lease.release()
        raise
    try:
        yield local.files
    except BaseException:
        try:
            _end(mirror, lease)
        except PlaceError as error:
            local_logger.warning("%s", error)
        else:
            local.note(place, unsent=False)
        raise
    _end(mirror, lease)
    local.note(place, unsent=False)


def _end(mirror: Mirror, lease: Lease) -> None:
    try:
        mirror.close()
    except BaseException:
        lease.release(tell=False)  # the bucket cannot be reached, and each attempt takes long
        raise
    with contextlib.suppress(PlaceError):
        lease.release()


def in_workdir(function: _Function) -> _Function:
    """Decorates a `function(config, path, …)` that trains, so that it gets the workdir's local directory."""

    @functools.wraps(function)
    def with_local(config: Any, path: str | os.PathLike[str], *args: Any, **options: Any) -> Any:
        with local_workdir(path, hold=True) as local:
            return function(config, local, *args, **options)

    return cast(_Function, with_local)


@contextlib.contextmanager
def to_write(path: str | os.PathLike[str], reads: str) -> Iterator[pathlib.Path]:
    """Yields the local file to write for `path`. For a bucket, it and the files written beside it are sent afterwards.

    Args:
      path: local, or in a bucket.
      reads: the name of a file beside it that the writer reads. The bucket's other files beside it appear as empty
        local files.

    Raises:
      PlaceError: the files cannot be sent; the message says where they are.
      UsageError: the path names no file.
    """
    if not in_bucket(path):
        yield pathlib.Path(path)
        return
    bucket = Bucket(path)
    if "/" not in bucket.url.partition("://")[2]:
        raise UsageError(f"{bucket.url} is a bucket: name a file in it")
    local = Local.of(bucket)
    folder = local.base / "written"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    show(folder, bucket.parent.url)
    for name in bucket.parent.names():
        with contextlib.suppress(OSError, ValueError):  # no local file can have the name
            (folder / name).touch()
    if (content := bucket.parent.read(reads)) is not None:
        (folder / reads).write_bytes(content)
    before = plain_files(folder)
    yield folder / bucket.name
    written = [name for name, stat in plain_files(folder).items() if before.get(name) != stat]
    try:
        bucket.parent.send({name: folder / name for name in written})
    except PlaceError as error:
        raise PlaceError(f"{error}; the new files are in {os.path.join(local.base, 'written')}") from error
