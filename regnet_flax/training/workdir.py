"""What a run leaves behind: config.json, metrics.jsonl, TensorBoard events, train.log and results.json."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import math
import os
import pathlib
import platform
import shlex
import sys
import time
from typing import Any

import jax

from regnet_flax.models.ops import current_options
from regnet_flax.training.interrupt import WorkdirError

CONFIG, METRICS, RESULTS, LOG, FIGURES = "config.json", "metrics.jsonl", "results.json", "train.log", "figures"
EVAL = "eval.json"  # of --mode eval
PROFILE = "profile"
# Metrics that TensorBoard groups under these headings.
_GROUPS = {"train_loss": "train/loss", "train_accuracy": "train/accuracy", "learning_rate": "train/learning_rate"}
_GROUPS |= {"eval_loss": "eval/loss", "eval_accuracy": "eval/accuracy", "eval_top5_accuracy": "eval/top5_accuracy"}
_GROUPS |= {"images_per_second": "train/images_per_second", "epoch": "train/epoch"}

logger = logging.getLogger("regnet_flax")


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes all of it or nothing: an interrupted write leaves the file that was there."""
    part = path.with_name(path.name + ".part")
    with open(part, "w") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def read_json(path: pathlib.Path) -> Any:
    """The file's value; None where there is no such file.

    Raises:
      WorkdirError: the file is no JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise WorkdirError(f"{path} cannot be read ({error}): restore it, or name another --workdir") from error


def read_plain_config(workdir: pathlib.Path) -> Any:
    """config.json as it stands, the model's options by their names of today; None where there is no such file.

    Raises:
      WorkdirError: it is no JSON.
    """
    stored = read_json(workdir / CONFIG)
    try:
        stored["model"]["overrides"] = current_options(stored["model"]["overrides"])
    except (KeyError, TypeError, ValueError):
        pass  # whether it is a run's config is for others to say
    return stored


def read_config(workdir: pathlib.Path) -> dict[str, Any] | None:
    """What config.json says of the workdir's run; None where there is no such file.

    Raises:
      WorkdirError: it is damaged.
    """
    stored = read_plain_config(workdir)
    if stored is None:
        return None
    try:
        counts = [stored["train"]["epochs"], stored["train"]["max_steps"], *stored["image_shape"]]
        texts = [stored["dataset_fingerprint"], *stored["class_names"]]
        whole = all(isinstance(n, int) for n in counts) and all(isinstance(text, str) for text in texts)
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise WorkdirError(f"{workdir / CONFIG} is not what a run writes: restore it, or name another --workdir")
    return stored


def read_results(workdir: pathlib.Path) -> dict[str, Any] | None:
    """A finished run's results.json; None where there is none that can be read, since the run can write it again."""
    try:
        results = read_json(workdir / RESULTS)
        if results is None or {"step", "last", "best"} <= results.keys():
            return results
    except (WorkdirError, AttributeError):
        pass
    logger.warning("%s is damaged and is written again", workdir / RESULTS)
    return None


def plain(value: Any) -> Any:
    """A config, or any nest of mappings and sequences, as JSON has it."""
    if hasattr(value, "items"):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return value


class MetricsLog:
    """metrics.jsonl, one object a line, and the same as TensorBoard events.

    Args:
      workdir: where they are.
      step: that the run goes on from; what was logged beyond it is cut, since the run will log it again.
    """

    def __init__(self, workdir: pathlib.Path, step: int):
        path = workdir / METRICS
        lines = [line for line in read_metrics(workdir) if line["step"] <= step]
        part = path.with_name(METRICS + ".part")
        part.write_text("".join(json.dumps(line) + "\n" for line in lines))
        part.replace(path)
        self._file = open(path, "a")
        try:
            self._events = _Events(workdir, step + 1)
        except ImportError:
            logger.warning("tensorboardX is not installed: no TensorBoard events are written")
            self._events = None

    def write(self, line: dict[str, Any]) -> None:
        """Appends one line; it holds at least "step"."""
        # JSON has no NaN; a loss that is not finite ends the run, and its message says so.
        finite = {k: v for k, v in line.items() if not isinstance(v, float) or math.isfinite(v)}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        if self._events is not None:
            scalars = {_GROUPS[name]: value for name, value in finite.items() if name in _GROUPS}
            self._events.write(scalars, line["step"])

    def close(self) -> None:
        try:
            self._file.close()
        finally:
            if self._events is not None:
                self._events.close()


class _Events:
    """A file of TensorBoard events.

    tensorboardX's SummaryWriter writes in a thread: its flush does not wait for what is still queued, so that a killed
    run would lack events whose checkpoint stands, and once the disk is full that thread is gone and the queue blocks.

    Args:
      workdir: where it is.
      first: the step from which on TensorBoard is to forget what earlier files have.
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

    def write(self, scalars: dict[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._add(self._event(step=step, summary=self._scalar(name, value)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; what is none, such as a last one that was cut off in the middle, is left out."""
    try:
        text = (workdir / METRICS).read_text(errors="replace")
    except FileNotFoundError:
        return []
    lines = []
    for found in text.splitlines():
        try:
            line = json.loads(found)
            lines.append(line | {"step": int(line["step"])})
        except (ValueError, TypeError, KeyError):
            logger.warning("%s has a line that is none of its own, which is dropped: %.60r", workdir / METRICS, found)
    return lines


class RunLog(logging.Handler):
    """What the run says while this is entered, and the error that ends it, in train.log as well, with the time.

    What is said before the workdir is known to be right waits until then.
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
        if logger.level == logging.NOTSET:  # a program of its own calls: its log is to be whole all the same
            logger.setLevel(logging.INFO)
        logger.addHandler(self)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        logger.removeHandler(self)
        if self._file is not None:
            if error is not None:
                message = f"{type(error).__name__}: {error}"
                with contextlib.suppress(OSError):  # The error may well be that the disk is full.
                    self._file.handle(logging.LogRecord(logger.name, logging.ERROR, "", 0, message, None, None))
            with contextlib.suppress(OSError):
                self._file.close()


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Ends the run with the error, as any other file that cannot be written does, where logging would print it."""
        raise


def environment(devices: list[Any]) -> dict[str, Any]:
    """Hardware and versions, for results.json."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "regnet-flax")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    script = pathlib.Path(sys.argv[0])
    program = ("python", "-m", "regnet_flax.main") if script.name == "main.py" else ("python", script.name)
    return {
        "hardware": {
            "platform": devices[0].platform,
            "device": devices[0].device_kind,
            "devices": len(devices),
            "processes": jax.process_count(),
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
            "cpu": processor(),
            "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        },
        "versions": versions,
        "command": shlex.join([*program, *sys.argv[1:]]),
    }


def processor() -> str:
    """The processor's name, as the system has it; its architecture where it has none."""
    with contextlib.suppress(OSError):  # Linux alone has the file
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
