"""What may stop a run from outside: signals, and another run on the same workdir."""

from __future__ import annotations

import os
import signal
import threading

import jax
from jax.experimental import multihost_utils

from regnet_flax.errors import Interrupted


class StopSignals:
    """While entered, SIGTERM and SIGINT ask the run to stop at the next step; a second one stops it at once.

    Python runs its handlers between bytecodes of the main thread, which is none while XLA compiles, and takes two
    signals for one meanwhile. So a thread counts them, by the bytes that the interpreter writes for each as it comes.
    With several processes a signal to one of them stops all at the same step: JAX takes SIGTERM itself, which SIGINT is
    passed on as, and agrees with the others.

    Attributes:
      received: the signal that was received, None before.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, object] = {}
        self._polls = 0
        self._counted, self._first, self._handled = threading.Event(), 0, 0

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
        if threading.current_thread() is not threading.main_thread():  # a notebook's worker: nothing can be caught
            return self
        # A handler of ours for SIGTERM would take the place of JAX's.
        for number in (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else (signal.SIGINT,):
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
            if number not in self._previous:  # another's, such as SIGCHLD
                continue
            if self._first:
                os._exit(128 + number)
            self._first = number
            if jax.process_count() == 1:
                self.received = number
            self._counted.set()

    def _handle(self, number: int, _: object) -> None:
        self._handled += 1
        if self._handled > 1:
            os._exit(128 + number)
        self._counted.wait()  # so that `received` is set where the main thread goes on
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def check(self) -> None:
        """Raises Interrupted if a signal came before there was anything to save."""
        if self.received is not None:
            raise Interrupted(self.received, f"stopped by signal {self.received} before the first step")
