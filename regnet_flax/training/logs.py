"""A run's log files: metrics.jsonl, trackers such as TensorBoard, train.log, and a trace if requested."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from regnet_flax import files
from regnet_flax.config.check import flatten
from regnet_flax.config.fields import FIELDS
from regnet_flax.errors import Interrupted, one_line
from regnet_flax.trackers.registry import open_trackers
from regnet_flax.training.workdir import LOG, METRICS, read_metrics, seed_line

logger = logging.getLogger("regnet_flax")

BEFORE, TRACED = 2, 5  # numbers of calls: the first ones compile


class MetricsLog:
    """Writes metrics.jsonl, one object per line, and the same values to the trackers.

    Args:
      workdir: the run's directory.
      step: the step from which the run resumes; later lines are removed, because the run will log them again.
      trackers: `log.trackers`.
      config: the resolved config.
      seeds: the seeds that train together, or one.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        step: int,
        trackers: Sequence[str] = FIELDS["log.trackers"].default,
        config: Mapping[str, Any] | None = None,
        seeds: Sequence[int] = (0,),
    ):
        path = workdir / METRICS
        lines = [line for line in read_metrics(workdir) if line["step"] <= step]
        files.write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        self._file = open(path, "a", encoding="utf-8")
        self._trackers = open_trackers(trackers, workdir, step + 1, dict(flatten(config or {})), seeds)

    def write(self, line: dict[str, Any]) -> None:
        """Appends one line, which has at least "step"."""
        # JSON has no NaN; a non-finite loss ends the run with a message anyway.
        finite = {k: v for k, v in line.items() if not isinstance(v, float) or math.isfinite(v)}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        seeds = line.get("seeds", {})
        for seed, tracker in self._trackers:
            if seed is not None and str(seed) not in seeds:
                tracker.finish("its loss or gradient is not finite")
                continue
            values = finite if seed is None else seed_line(finite, seed)
            scalars = {_tag(k): v for k, v in values.items() if isinstance(v, (int, float)) and k != "step"}
            tracker.log(line["step"], scalars)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        with contextlib.ExitStack() as ends:
            ends.callback(self._file.close)
            for _, tracker in self._trackers:
                ends.callback(tracker.finish, "" if error is None else one_line(error))


def _tag(name: str) -> str:
    """Returns a metric's name in trackers, grouped by its kind: "train/loss" for "train_loss"."""
    kind, _, rest = name.partition("_")
    return f"{kind}/{rest}" if kind in ("train", "eval") else f"train/{name}"


class RunLog(logging.Handler):
    """A context manager that also writes log messages, and what ends the run early, to train.log with the time.

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
                level, message = logging.ERROR, f"{type(error).__name__}: {error}"
                if isinstance(error, Interrupted):
                    level, message = logging.INFO, str(error)
                with contextlib.suppress(OSError):  # The error itself may be a full disk.
                    self._file.handle(logging.LogRecord(logger.name, level, "", 0, message, None, None))
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
