"""TensorBoard's events, in the workdir."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from regnet_flax.trackers.registry import Start


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Keeps tensorboardX from importing PyTorch, which takes seconds and is not needed."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        del sys.modules["torch"]


class TensorBoard:
    """A file of TensorBoard events.

    tensorboardX's SummaryWriter is not used, because it writes in a thread. Its flush does not wait for queued events,
    so a killed run could have a checkpoint without its events. Once the disk is full, the thread dies and the queue
    blocks.

    Args:
      start: names the workdir, and the step from which TensorBoard discards the events of earlier files.
    """

    id = ""

    def __init__(self, start: Start):
        with _without_torch():
            from tensorboardX import event_file_writer, summary
            from tensorboardX.proto import event_pb2

        protocol: Any = event_pb2
        self._event, self._scalar = protocol.Event, summary.scalar
        self._writer = event_file_writer.EventsWriter(str(start.workdir / "events"))
        began = protocol.SessionLog(status=protocol.SessionLog.START)
        self._add(self._event(step=start.step, session_log=began))
        self._writer.flush()

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)

    def config(self, values: Mapping[str, Any]) -> None:
        """Does nothing: config.json is in the same directory."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._add(self._event(step=step, summary=self._scalar(name, value)))
        self._writer.flush()

    def finish(self, error: str) -> None:
        self._writer.close()
