"""Signals that stop a run, or make it save."""

from __future__ import annotations

import logging
import os
import signal
import threading

import jax
from jax.experimental import multihost_utils

from regnet_flax.errors import Interrupted

logger = logging.getLogger("regnet_flax")


class StopSignals:
    """Inside this context, SIGTERM, SIGINT and SIGHUP stop the run at the next step, and SIGUSR1 makes it save.

    A second SIGTERM or SIGINT stops it at once; a second SIGHUP does not, because a closing terminal may send two. If
    SIGHUP is ignored, as under nohup, it stays ignored.

    Python runs its handlers between bytecodes of the main thread, so not while XLA compiles, and it merges signals that
    arrive meanwhile. So a thread counts them, by the byte that the interpreter writes for each one as it arrives. With
    several processes, a signal to one of them stops all at the same step: JAX itself handles SIGTERM and agrees with
    the others, and SIGINT is forwarded as SIGTERM; SIGUSR1 does nothing there.

    Inside another context, such as that of a comparison, `with StopSignals() as stop` gives the outer one: a signal in
    a run's last moments stops the comparison.

    Attributes:
      received: the signal that was received, None before.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, object] = {}
        self._polls = 0
        self._save_asked = False
        self._counted, self._first, self._handled = threading.Event(), 0, 0

    @property
    def cause(self) -> str:
        """The cause of the stop, such as "Stopped by SIGTERM"; only valid once a signal was received."""
        assert self.received is not None
        return f"Stopped by {signal.Signals(self.received).name}"

    def poll(self) -> bool:
        """Whether to stop now; all processes must call it at the same points."""
        if jax.process_count() > 1:
            # Not the step, which does not change during an evaluation: JAX needs a new number at each call.
            self._polls += 1
            if multihost_utils.reached_preemption_sync_point(self._polls):
                self.received = signal.SIGTERM
                return True
            return False
        return self.received is not None

    def take_save(self) -> bool:
        """Whether SIGUSR1 asked to save since the last call."""
        asked, self._save_asked = self._save_asked, False
        return asked and jax.process_count() == 1

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():  # only the main thread can set handlers
            return self
        outer = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
        if isinstance(outer, StopSignals):
            return outer
        # Our own handler for SIGTERM would replace JAX's.
        numbers = [signal.SIGTERM] if jax.process_count() == 1 else []
        numbers += [signal.SIGINT, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        for number in numbers:
            self._previous[number] = signal.signal(number, self._handle)
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous_writer = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._count, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._previous:
            return
        signal.set_wakeup_fd(self._previous_writer)
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        os.close(self._writer)
        self._thread.join()
        os.close(self._reader)

    def _count(self) -> None:
        while byte := os.read(self._reader, 1):
            number = byte[0]
            if number not in self._previous:  # not one of ours, such as SIGCHLD
                continue
            if number == signal.SIGUSR1:
                self._save_asked = True
                continue
            if self._first:
                if number == signal.SIGHUP:
                    continue
                os._exit(128 + number)
            self._first = number
            if jax.process_count() == 1:
                self.received = number
            self._counted.set()
            # Only now: the main thread may hold the log's lock while it waits for `_counted`.
            again = "" if number == signal.SIGHUP else "; a second signal stops at once, without saving"
            logger.info("%s: stopping after this step, then saving%s", signal.Signals(number).name, again)

    def _handle(self, number: int, _: object) -> None:
        if number == signal.SIGUSR1 or (number == signal.SIGHUP and self._handled):
            return
        self._handled += 1
        if self._handled > 1:
            os._exit(128 + number)
        self._counted.wait()  # so that `received` is set before the main thread continues
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def check(self) -> None:
        """Raises Interrupted if a signal came before there was anything to save."""
        if self.received is not None:
            raise Interrupted(self.received, f"{self.cause} before the first step; run the same command to start again")
