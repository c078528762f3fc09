"""TensorBoard's events, in the workdir."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from regnet_flax.trackers.registry import Start


class TensorBoard:
    """A file of TensorBoard events.

    tensorboardX's SummaryWriter writes in a thread: its flush does not wait for what is still queued, so that a killed
    run would lack events whose checkpoint stands, and once the disk is full that thread is gone and the queue blocks.

    Args:
      start: TensorBoard is to forget what earlier files have from its step on.
    """

    id = ""

    def __init__(self, start: Start):
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
        """Nothing: config.json stands beside the events."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._add(self._event(step=step, summary=self._scalar(name, value)))
        self._writer.flush()

    def finish(self, error: str) -> None:
        self._writer.close()
