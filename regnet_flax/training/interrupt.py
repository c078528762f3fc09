"""What may stop a run from outside: signals, and another run on the same workdir."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import signal
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from regnet_flax.training import processes


class Interrupted(Exception):
    """The run was asked to stop, and has saved.

    Attributes:
      exit_code: 128 + the signal's number.
    """

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signal_number


class StopSignals:
    """While entered, SIGTERM and SIGINT ask the run to stop at the next step; a second one stops it at once.

    With several processes a signal to one of them stops all at the same step: JAX takes SIGTERM itself, which SIGINT is
    passed on as, and agrees with the others.

    Attributes:
      received: the signal that was received, None before.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, object] = {}
        self._polls = 0

    def poll(self) -> bool:
        """Whether to stop now; every process has to ask at the same places."""
        if jax.process_count() > 1:
            # Not by the step, which is the same again and again in an evaluation: JAX wants each number once.
            self._polls += 1
            if multihost_utils.reached_preemption_sync_point(self._polls):
                self.received = signal.SIGTERM
                return True
            return False
        return self.received is not None

    def __enter__(self) -> StopSignals:
        # A handler of ours for SIGTERM would take the place of JAX's.
        for number in (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else (signal.SIGINT,):
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread, as in a notebook's worker: nothing to catch
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _handle(self, number: int, _: object) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)


class WorkdirError(ValueError):
    """The workdir cannot be used; the message is one line."""


@contextlib.contextmanager
def workdir_lock(workdir: pathlib.Path) -> Iterator[None]:
    """Holds the workdir for this process, and those it trains with; the lock does not outlive it.

    Raises:
      WorkdirError: another run holds it, or it is no directory that can be written to.
    """
    with processes.together(), contextlib.ExitStack() as held:
        if processes.is_primary():
            held.enter_context(_primary_lock(workdir))
        held = held.pop_all()
    with held:
        yield


@contextlib.contextmanager
def _primary_lock(workdir: pathlib.Path) -> Iterator[None]:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / ".lock", "a+")
    except FileExistsError as error:
        raise WorkdirError(f"--workdir {workdir} is a file: name a directory") from error
    except OSError as error:
        raise WorkdirError(f"--workdir {workdir} cannot be written to: {error.strerror}; name another") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise WorkdirError(
                f"another run (process {owner}) is training in {workdir}: "
                "wait for it, stop it, or name another --workdir"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
