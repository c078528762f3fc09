"""A run's progress on standard output: a live display on a terminal, plain lines in a file."""

from __future__ import annotations

import contextlib
import errno
import inspect
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from regnet_flax.files import duration

COLUMNS = 100
PATIENCE = 5.0  # seconds

logger = logging.getLogger("regnet_flax")


def describe(line: dict[str, Any], total_steps: int, epochs: int, left: float | None, split: str = "test") -> str:
    """Formats one line of metrics.jsonl, whose evaluation is of `split`, for people, in at most COLUMNS columns.

    If it does not fit, the least important parts are dropped first; metrics.jsonl has all of them.
    """
    parts = {"epoch": f"epoch {line['epoch']:.4g}/{epochs}", "step": f"step {line['step']}/{total_steps}"}
    if "train_loss" in line:
        parts["train"] = f"train loss {line['train_loss']:.4f}, acc. {line['train_accuracy']:.2%}"
    if "eval_loss" in line:
        short = "val" if split == "validation" else split
        parts["eval"] = f"{short} loss {line['eval_loss']:.4f}, acc. {line['eval_accuracy']:.2%}"
        if "eval_top5_accuracy" in line:
            parts["top5"] = f"top-5 {line['eval_top5_accuracy']:.2%}"
    if "learning_rate" in line:
        parts["rate"] = f"rate {line['learning_rate']:.3g}"
    if line.get("images_per_second"):
        parts["speed"] = f"{line['images_per_second']:,.0f} images/s"
    if left is not None:
        parts["left"] = f"{duration(left)} left"
    for name in ("rate", "speed", "top5", "step", "left"):
        if len(" · ".join(parts.values())) > COLUMNS:
            parts.pop(name, None)
    return " · ".join(parts.values())


def say_table(table: Any) -> None:
    """Prints a rich table: as wide as the terminal, or with one line per row elsewhere."""
    width = None if sys.stdout.isatty() else 10_000
    Console(file=sys.stdout, width=width, markup=False, highlight=False, emoji=False).print(table)


def outlive_output(error: OSError, stream: Any = None) -> None:
    """Discards further output if the reader of `stream`, by default sys.stdout, is gone; otherwise raises the error."""
    if error.errno not in (errno.EPIPE, errno.EIO):
        raise error
    # Otherwise the text still in the stream's buffer would raise an error when the program ends.
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), (stream or sys.stdout).fileno())


_stops: list[Callable[[], None]] = []


def working(what: str, *, log: bool = True) -> None:
    """Shows on a terminal, until the next call, what the program does before its first step; "" clears it.

    Elsewhere it is logged, with `log`, if it takes longer than PATIENCE.
    """
    if _stops:
        try:
            _stops.pop()()
        except OSError as error:  # the terminal was closed
            outlive_output(error)
    if not what:
        return
    if sys.stdout.isatty():
        console = Console(file=sys.stdout)
        progress = Progress(TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True)
        progress.add_task(what, total=None)
        progress.start()
        _stops.append(progress.stop)
    elif log:
        timer = threading.Timer(PATIENCE, logger.info, (what,))
        timer.daemon = True
        timer.start()
        _stops.append(timer.cancel)


class _AboveTheBar(logging.Handler):
    def __init__(self, console: Console):
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else None
        try:
            self._console.print(self.format(record), style=style, highlight=False, markup=False, soft_wrap=True)
        except OSError as error:  # the terminal was closed
            outlive_output(error)


class RunDisplay:
    """The live display of a training run; log lines scroll above it. If output goes to a file, nothing is live.

    Args:
      total_steps: the run's steps.
      epochs: the run's epochs.
      steps_per_epoch: batches per epoch.
      batch_size: images per step.
      step: the step from which the run resumes.
      split: the evaluated split.
    """

    def __init__(
        self, total_steps: int, epochs: int, steps_per_epoch: int, batch_size: int, step: int, split: str = "test"
    ):
        self._split = split
        self._total, self._epochs, self._steps_per_epoch = total_steps, epochs, steps_per_epoch
        self._batch_size, self._step, self._first = batch_size, step, step
        self._begin: float | None = None
        from regnet_flax.training import parallel  # imports JAX, so only after `working`

        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[doing]}"),
            console=Console(file=sys.stdout),
            transient=True,
        )
        # Not the console's is_terminal: FORCE_COLOR and TTY_COMPATIBLE make it true for a file.
        self._live = sys.stdout.isatty() and parallel.is_primary()
        self._task = self._progress.add_task(
            "", total=total_steps, completed=step, epoch=self._epoch(), rate="", left="", doing="compiling"
        )

    def __enter__(self) -> RunDisplay:
        working("")
        if self._live:
            self._replaced = console_handlers()
            for handler in self._replaced:
                logger.removeHandler(handler)
            self._handler = _AboveTheBar(self._progress.console)
            logger.addHandler(self._handler)
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            try:
                self._progress.stop()
            except OSError as error:
                outlive_output(error)
            logger.removeHandler(self._handler)
            for handler in self._replaced:
                logger.addHandler(handler)

    def _epoch(self) -> str:
        return f"{min(self._epochs, self._step // self._steps_per_epoch + 1)}/{self._epochs}"

    def step(self, step: int) -> None:
        """Shows that `step` steps are done."""
        if self._begin is None:  # the first call compiles, which would distort the rate
            self._begin, self._first = time.monotonic(), step
        self._step = step
        left, elapsed = self.seconds_left(), time.monotonic() - self._begin
        rate = (step - self._first) * self._batch_size / elapsed if elapsed else 0
        self._progress.update(
            self._task,
            completed=step,
            epoch=self._epoch(),
            rate=f"{rate:,.0f} images/s" if rate else "",
            left="" if left is None else f"{duration(left)} left",
            doing="",
        )

    def doing(self, what: str) -> None:
        """Shows what the run does between two steps."""
        self._progress.update(self._task, doing=what)

    def seconds_left(self) -> float | None:
        """Estimates the time left from the steps so far and everything between them; None before the second call."""
        if self._begin is None or self._step <= self._first:
            return None
        return (time.monotonic() - self._begin) / (self._step - self._first) * (self._total - self._step)

    def log(self, line: dict[str, Any]) -> None:
        """Logs one line of metrics.jsonl."""
        logger.info(describe(line, self._total, self._epochs, self.seconds_left(), self._split))


def console_handlers() -> list[logging.Handler]:
    """Returns the logger's handlers that write to the console."""
    return [handler for handler in logger.handlers if isinstance(handler, _Console)]


def log_to_console(level: int = logging.INFO, stream: str = "stdout") -> None:
    """Writes log messages from this level on to standard output, or to "stderr", and marks warnings."""
    from absl import logging as absl_logging

    # Orbax logs pages of traceback there, which its exceptions repeat; the threads of a failed save or read print them
    # once more.
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    # Such an image is refused, with a message of our own.
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")
    sys.unraisablehook = _without_orbax(sys.unraisablehook)
    for handler in console_handlers():
        logger.removeHandler(handler)
    logger.addHandler(_Console(level, stream))
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _without_orbax(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def say(unraisable: Any) -> None:
        if not inspect.iscoroutine(unraisable.object) and str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    return say


class _Console(logging.Handler):
    def __init__(self, level: int, stream: str):
        super().__init__(level)
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        stream = getattr(sys, self._stream)  # it may have been replaced, as in a notebook
        try:
            print(prefix + self.format(record), file=stream, flush=True)
        except OSError as error:
            outlive_output(error, stream)
