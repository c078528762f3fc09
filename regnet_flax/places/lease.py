"""Records which run trains in a bucket's directory, in objects .lock/1, .lock/2, …; the last one counts."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pathlib
import socket
import threading
import time
from typing import Any

from regnet_flax.errors import PlaceError, WorkdirError
from regnet_flax.files import runs
from regnet_flax.places.bucket import Bucket

LEASE = 60.0  # a run without a heartbeat for this many seconds has ended
RENEWALS = 4  # heartbeats in that time

LOCK = ".lock"
_HELD: set[str] = set()  # the places of this process's leases

# This logger's messages keep local paths; see `local.show`.
logger = logging.getLogger("regnet_flax.places")


class Lease:
    """The right to write a run into a bucket, until its holder releases it or its heartbeats end.

    Each holder creates the next object in the sequence. A bucket lets only one caller create it, and the last object
    stays when the lease is released, so there are never two holders, even if one has an outdated view of the bucket.
    Clocks are not compared: a waiting run checks whether the object changes within LEASE seconds.

    Args:
      bucket: the run's directory.
      place: names the local files of this holder.

    Attributes:
      previous: the place of the previous holder; "" if there was none.
      lost: whether another holder took over, for example after a long loss of the network.

    Raises:
      WorkdirError: another run holds the lease.
      PlaceError: the bucket cannot be used.
    """

    def __init__(self, bucket: Bucket, place: str):
        self._url, self._objects = bucket.url, bucket.below(LOCK)
        self._place, self.lost, self._sign = place, False, 0
        while True:
            number, owner = _last_owner(self._objects)
            if owner.get("held") and not _ended_here(owner):
                self._wait_for(number, owner)
            self._number, self.previous = number + 1, str(owner.get("place", ""))
            # If the listing is out of date by two holders, the number may be free again.
            made = self._objects.create(str(self._number), self._content(held=True))
            if made and max(_numbers(self._objects)) == self._number:
                break
        self._objects.delete(str(n) for n in _numbers(self._objects) if n < self._number)
        _HELD.add(place)
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def _content(self, *, held: bool) -> bytes:
        self._sign += 1
        who = {"host": socket.gethostname(), "boot": _boot(), "process": os.getpid(), "place": self._place}
        return json.dumps(who | {"held": held, "sign": self._sign, "time": time.time()}).encode()

    def _wait_for(self, number: int, owner: dict[str, Any]) -> None:
        """Returns once the holder has released the lease, or sent no heartbeat for LEASE seconds."""
        who = f"machine {owner.get('host')}, process {owner.get('process')}"
        logger.info("%s: waiting %d s for a heartbeat from the run on %s", self._url, LEASE, who)
        until = time.monotonic() + LEASE
        while time.monotonic() < until:
            time.sleep(LEASE / 4 / RENEWALS)
            now = _last_owner(self._objects)
            if now != (number, owner) and now[1].get("held"):
                raise WorkdirError(
                    f"another run ({who}) is training in {self._url}: wait for it, stop it, or name another --workdir"
                )
            if now != (number, owner):
                return

    def _renew(self) -> None:
        while not self._released.wait(LEASE / RENEWALS):
            with contextlib.suppress(PlaceError):  # the network may return, and the mirror reports what is not sent
                if self.holds():
                    self._objects.write({str(self._number): self._content(held=True)})

    def holds(self) -> bool:
        """Asks the bucket whether this is still the holder."""
        self.lost = self.lost or _last_owner(self._objects)[0] != self._number
        return not self.lost

    def release(self, *, tell: bool = True) -> None:
        """Releases the lease. Unless it tells the bucket, the next run waits for a heartbeat."""
        self._released.set()
        _HELD.discard(self._place)
        if not tell:
            return
        self._thread.join()
        if self.holds():
            self._objects.write({str(self._number): self._content(held=False)})


def last_place(bucket: Bucket) -> str:
    """Returns the place of the last holder; "" if there was none."""
    return str(_last_owner(bucket.below(LOCK))[1].get("place", ""))


def _numbers(objects: Bucket) -> list[int]:
    return [int(name) for name in objects.list() if name.isdecimal()]


def _last_owner(objects: Bucket) -> tuple[int, dict[str, Any]]:
    """Returns the number of the last object, 0 for none, and what it records about its holder."""
    number = max(_numbers(objects), default=0)
    try:
        owner = json.loads(objects.read(str(number)) or b"{}") if number else {}
    except ValueError:
        owner = {}
    return number, owner if isinstance(owner, dict) else {}


def _ended_here(owner: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    here = owner.get("host") == socket.gethostname() and owner.get("boot") == _boot()
    process = owner.get("process")
    if here and process == os.getpid():
        return owner.get("place") not in _HELD
    return here and isinstance(process, int) and not runs(process)


def _boot() -> str:
    # Two machines may have the same name.
    with contextlib.suppress(OSError):
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return ""
