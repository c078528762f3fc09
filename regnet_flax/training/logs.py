"""A run's log files: metrics.jsonl, TensorBoard events, train.log, and a trace if requested."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax

from regnet_flax import files
from regnet_flax.training.workdir import LOG, METRICS, read_metrics

logger = logging.getLogger("regnet_flax")

BEFORE, TRACED = 2, 5  # numbers of calls: the first ones compile


class MetricsLog:
    """Writes metrics.jsonl, one object per line, and the same values as TensorBoard events.

    Args:
      workdir: the directory of both.
      step: the step from which the run resumes; later lines are removed, because the run will log them again.
    """

    def __init__(self, workdir: pathlib.Path, step: int):
        path = workdir / METRICS
        lines = [line for line in read_metrics(workdir) if line["step"] <= step]
        files.write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        self._file = open(path, "a", encoding="utf-8")
        try:
            self._events = _Events(workdir, step + 1)
        except ImportError:
            logger.warning("tensorboardX is not installed: no TensorBoard events are written")
            self._events = None

    def write(self, line: dict[str, Any]) -> None:
        """Appends one line, which has at least "step"."""
        # JSON has no NaN; a non-finite loss ends the run with a message anyway.
        finite = {k: v for k, v in line.items() if not isinstance(v, float) or math.isfinite(v)}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        if self._events is not None:
            scalars = {_tag(k): v for k, v in finite.items() if isinstance(v, (int, float)) and k != "step"}
            self._events.write(scalars, line["step"])

    def close(self) -> None:
        try:
            self._file.close()
        finally:
            if self._events is not None:
                self._events.close()


def _tag(name: str) -> str:
    """Returns a metric's TensorBoard tag, grouped by its kind: "train/loss" for "train_loss"."""
    kind, _, rest = name.partition("_")
    return f"{kind}/{rest}" if kind in ("train", "eval") else f"train/{name}"


class _Events:
    """A file of TensorBoard events.

    tensorboardX's SummaryWriter is not used, because it writes in a thread. Its flush does not wait for queued events,
    so a killed run could have a checkpoint without its events. Once the disk is full, the thread dies and the queue
    blocks.

    Args:
      workdir: the file's directory.
      first: the step from which TensorBoard discards the events of earlier files.
    """

    def __init__(self, workdir: pathlib.Path, first: int):
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2

        protocol: Any = event_pb2
        self._event, self._scalar = protocol.Event, summary.scalar
        self._writer = event_file_writer.EventsWriter(str(workdir / "events"))
        start = protocol.SessionLog(status=protocol.SessionLog.START)
        self._add(self._event(step=first, session_log=start))
        self._writer.flush()

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._add(self._event(step=step, summary=self._scalar(name, value)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class RunLog(logging.Handler):
    """A context manager that also writes log messages, and the error that ends the run, to train.log with the time.

    Messages wait in memory until the workdir is known to be valid.
    """

    def __init__(self) -> None:
        super().__init__()
        self._waiting: list[logging.LogRecord] = []
        self._file: logging.Handler | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self._file is None:
            self._waiting.append(record)
        else:
            self._file.handle(record)

    def write_to(self, workdir: pathlib.Path) -> None:
        """Opens train.log."""
        self._file = _LogFile(workdir / LOG, encoding="utf-8", errors="backslashreplace")
        self._file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        for record in self._waiting:
            self._file.handle(record)
        self._waiting.clear()

    def __enter__(self) -> RunLog:
        if logger.level == logging.NOTSET:  # called from another program: train.log should be complete there too
            logger.setLevel(logging.INFO)
        logger.addHandler(self)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        logger.removeHandler(self)
        if self._file is not None:
            if error is not None:
                message = f"{type(error).__name__}: {error}"
                with contextlib.suppress(OSError):  # The error itself may be a full disk.
                    self._file.handle(logging.LogRecord(logger.name, logging.ERROR, "", 0, message, None, None))
            with contextlib.suppress(OSError):
                self._file.close()


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Ends the run with the error, like any other file that cannot be written; logging would only print it."""
        raise


class Trace:
    """Traces some calls of the compiled steps, once.

    Args:
      directory: the directory for the trace; None for no trace.
    """

    def __init__(self, directory: pathlib.Path | None):
        self._directory, self._calls, self._running = directory, 0, False

    def after_call(self, done: jax.Array) -> None:
        """Counts one call; `done` is an array that is ready when the call has ended."""
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
