"""Copies a run's local directory to a bucket while the run writes it.

A checkpoint consists of many objects, which a bucket cannot write at once. So an object COMMITTED beside the
checkpoints lists the complete ones, with a digest of each file. It is written after their files, and only listed
checkpoints are read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import shutil
import threading
from collections.abc import Iterator
from typing import Any

from regnet_flax.errors import Error, PlaceError, WorkdirError, one_line
from regnet_flax.places.bucket import Bucket
from regnet_flax.places.lease import Lease

POLL = 10.0  # seconds between two checks for new files
CHECKPOINTS, RESULTS, COMMITTED = "checkpoints", "results.json", "committed.json"
METRICS = "metrics"

# This logger's messages keep local paths; see `local.show`.
logger = logging.getLogger("regnet_flax.places")

Stat = tuple[int, int]  # size and time of the last change, in ns


class _TakenOverError(PlaceError):
    """Another run holds the bucket."""


class Mirror:
    """Sends the changes in a local directory, in a thread, until it is closed.

    Args:
      local: the directory.
      bucket: the destination.
      lease: the right to write there.
      links: a directory on the same file system, with links to the files that are being sent, because the run may
        delete a checkpoint meanwhile.
      fetched: whether `local` has just been fetched, so that its files need not be sent.
    """

    def __init__(self, local: pathlib.Path, bucket: Bucket, lease: Lease, links: pathlib.Path, *, fetched: bool):
        self._local, self._bucket, self._lease, self._links = local, bucket, lease, links
        # Files that others wrote beside the run stay, but old results must not outlive the resumption.
        kept = {name: (-1, -1) for name in bucket.list() if is_plain(name) and _is_result(name)}
        self._sent: dict[str, Stat] = plain_files(local) if fetched else kept
        self._committed = {name: read_committed(bucket, name) or {} for name in _committed_lists(bucket)}
        self._failing, self._closed = False, threading.Event()
        # Maps a checkpoint's files to their digests, while the files do not change.
        self._digests: dict[tuple[str, str, Stat], str] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._closed.wait(POLL):
            try:
                self._send()
            except Exception as error:
                if not self._failing:
                    what = str(error) if isinstance(error, Error) else one_line(error)
                    logger.warning("%s; training continues in %s, and sending is tried again", what, self._local)
                self._failing = True
            else:
                if self._failing:
                    logger.info("%s: sending works again", self._bucket.url)
                self._failing = False

    def close(self) -> None:
        """Sends the rest.

        Raises:
          PlaceError: the rest cannot be sent, or another run took over; the message says where it is.
        """
        self._closed.set()
        self._thread.join()
        try:
            self._send()
        except _TakenOverError:
            raise
        except PlaceError as error:
            raise PlaceError(
                f"{error}; the unsent files are in {self._local}, and the same command on this machine sends them"
            ) from error

    def _send(self) -> None:
        if not self._lease.holds():
            raise _TakenOverError(
                f"another run took over {self._bucket.url}, because this one sent no heartbeat for a while: "
                f"the files of this one are in {self._local}"
            )
        # Results mark a run as finished, so they are listed before all other files, and sent after them.
        finished = set(filter(_is_result, plain_files(self._local)))
        steps = {folder: _whole_steps(folder) for folder in sorted(self._local.rglob(CHECKPOINTS)) if folder.is_dir()}
        plain = plain_files(self._local)
        gone = self._sent.keys() - plain.keys()
        self._bucket.delete(sorted(gone))
        for name in gone:
            del self._sent[name]
        self._send_plain({name: stat for name, stat in plain.items() if not _is_result(name)})
        for folder, found in steps.items():
            self._send_checkpoints(folder, found)
        self._send_plain({name: stat for name, stat in plain.items() if name in finished})

    def _send_plain(self, files: dict[str, Stat]) -> None:
        contents = {}
        for name, stat in files.items():
            if self._sent.get(name) != stat:
                with contextlib.suppress(FileNotFoundError):  # it is gone, which the next call sees
                    contents[name] = (self._local / name).read_bytes()
        self._bucket.write(contents)
        self._sent |= {name: files[name] for name in contents}

    def _send_checkpoints(self, folder: pathlib.Path, steps: dict[str, dict[str, Stat]]) -> None:
        name = folder.relative_to(self._local).as_posix()
        objects = self._bucket.below(name)
        if name not in self._committed:  # without a list, half-sent checkpoints would be read too
            there = {file: found.size for file, found in objects.list().items()}
            copied = [files for files in steps.values() if all(there.get(f) == size for f, (size, _) in files.items())]
            self._commit(
                objects, name, {f: self._digest(name, folder, f, s) for files in copied for f, s in files.items()}
            )
        before = self._committed[name]
        shutil.rmtree(self._links, ignore_errors=True)
        committed, new = {}, {}
        for step, files in steps.items():
            known = {file: digest for file, stat in files.items() if (digest := self._digests.get((name, file, stat)))}
            if known.keys() == files.keys() and known.items() <= before.items():
                committed |= known
            elif linked := self._link(folder, step, files):
                new |= linked
                committed |= {file: self._digest(name, self._links, file, files[file]) for file in linked}
            else:  # it is being changed or deleted, which the next call sees
                committed |= {file: digest for file, digest in before.items() if file.partition("/")[0] == step}
        changed = {file for file in new if before.get(file, committed[file]) != committed[file]}
        # A step's metrics are a single object, so replacing it leaves no mixture.
        if changed := {file for file in changed if file.split("/")[1] != METRICS}:
            # A damaged step was repeated: the list must not lead to a mixture of old and new files.
            steps_changed = {file.partition("/")[0] for file in changed}
            before = {file: digest for file, digest in before.items() if file.partition("/")[0] not in steps_changed}
            self._commit(objects, name, before)
        objects.send({file: path for file, path in new.items() if before.get(file) != committed[file]})
        if before != committed:
            self._commit(objects, name, committed)
            objects.delete(sorted(objects.list().keys() - committed.keys() - {COMMITTED}))
        shutil.rmtree(self._links, ignore_errors=True)

    def _digest(self, name: str, folder: pathlib.Path, file: str, stat: Stat) -> str:
        if (name, file, stat) not in self._digests:
            with open(folder / file, "rb") as opened:
                self._digests[name, file, stat] = hashlib.file_digest(opened, "sha256").hexdigest()
        return self._digests[name, file, stat]

    def _commit(self, objects: Bucket, name: str, files: dict[str, str]) -> None:
        objects.write({COMMITTED: json.dumps(files, indent=1).encode()})
        self._committed[name] = dict(files)

    def _link(self, folder: pathlib.Path, step: str, files: dict[str, Stat]) -> dict[str, pathlib.Path]:
        """Makes links to the files of a step; returns {} if the step is being deleted."""
        linked = {}
        try:
            for file in files:
                linked[file] = self._links / file
                linked[file].parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(folder / file, linked[file])
                except FileNotFoundError:
                    raise
                except OSError:
                    shutil.copyfile(folder / file, linked[file])  # some file systems have no links
        except FileNotFoundError:
            return {}
        return linked if _whole_steps(folder).get(step) == files else {}


def plain_files(local: pathlib.Path) -> dict[str, Stat]:
    """Returns a run's files, by names with slashes, without checkpoints, hidden files and those being written."""
    return {name: stat for name, stat in _files(local) if is_plain(name) and not name.endswith(".part")}


def is_plain(name: str) -> bool:
    """Whether a name belongs neither to a checkpoint nor to a hidden file."""
    parts = name.split("/")
    return CHECKPOINTS not in parts[:-1] and not any(part.startswith(".") for part in parts)


def _is_result(name: str) -> bool:
    return name.rpartition("/")[2] == RESULTS


def read_committed(bucket: Bucket, folder: str) -> dict[str, str] | None:
    """Returns the digests of complete checkpoints' files, by their names in the folder; None if there is no list."""
    content = bucket.below(folder).read(COMMITTED)
    if content is None:
        return None
    try:
        found: Any = json.loads(content)
        return {str(name): str(digest) for name, digest in found.items()}
    except (ValueError, AttributeError) as error:
        raise WorkdirError(f"{bucket.url}/{folder}/{COMMITTED} is damaged: restore it, or use another run") from error


def _committed_lists(bucket: Bucket) -> list[str]:
    """Returns the folders of checkpoints that have a list."""
    return [name.rpartition("/")[0] for name in bucket.list() if name.endswith(f"{CHECKPOINTS}/{COMMITTED}")]


def _whole_steps(folder: pathlib.Path) -> dict[str, dict[str, Stat]]:
    """Returns the files of each step that Orbax has finished, by their names in the folder of checkpoints."""
    steps = sorted((path.name for path in folder.iterdir() if path.name.isdecimal()), key=int)
    found = {step: {f"{step}/{name}": stat for name, stat in _files(folder / step)} for step in steps}
    return {step: files for step, files in found.items() if files}


def _files(folder: pathlib.Path) -> Iterator[tuple[str, Stat]]:
    for directory, _, names in os.walk(folder):
        for name in names:
            path = pathlib.Path(directory, name)
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                yield path.relative_to(folder).as_posix(), (stat.st_size, stat.st_mtime_ns)
