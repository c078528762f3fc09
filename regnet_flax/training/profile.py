"""A trace of a few training steps, for TensorBoard or Perfetto."""

from __future__ import annotations

import logging
import pathlib

import jax

logger = logging.getLogger("regnet_flax")

BEFORE, TRACED = 2, 5  # calls: the first ones compile


class Trace:
    """Traces some calls of the compiled steps, once.

    Args:
      directory: where the trace goes; None for none.
    """

    def __init__(self, directory: pathlib.Path | None):
        self._directory, self._calls, self._running = directory, 0, False

    def after_call(self, done: jax.Array) -> None:
        """To be called after each call; `done` is ready when the call has ended."""
        if self._directory is None:
            return
        self._calls += 1
        if self._calls == BEFORE:
            jax.block_until_ready(done)
            jax.profiler.start_trace(self._directory, create_perfetto_trace=True)
            self._running = True
        elif self._calls == BEFORE + TRACED:
            jax.block_until_ready(done)
            self.stop()

    def stop(self) -> None:
        """Writes the trace, if one is running."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            logger.info("trace of %d calls: %s", self._calls - BEFORE, self._directory)
