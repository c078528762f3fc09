"""A run's workdir: its files, its lock, and the checks before its run resumes."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import pathlib
import socket
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from regnet_flax.config.resolve import changed_fields, changed_rounding
from regnet_flax.data import sources, stream
from regnet_flax.errors import ConfigError, WorkdirError
from regnet_flax.files import read_json, read_json_lines, runs
from regnet_flax.models.ops import current_options
from regnet_flax.training import parallel

CONFIG, METRICS, RESULTS, LOG, FIGURES = "config.json", "metrics.jsonl", "results.json", "train.log", "figures"
EVAL = "eval.json"  # written by --mode eval
PROFILE = "profile"
CHECKPOINTS = "checkpoints"

logger = logging.getLogger("regnet_flax")


def read_plain_config(workdir: pathlib.Path) -> Any:
    """Returns config.json as stored, but with today's names of the model's options; None if there is no such file.

    Raises:
      WorkdirError: the file is not JSON.
    """
    stored = read_json(workdir / CONFIG)
    try:
        stored["model"]["overrides"] = current_options(stored["model"]["overrides"])
    except (KeyError, TypeError, ValueError):
        pass  # the callers check whether it is a run's config
    return stored


def read_config(workdir: pathlib.Path) -> dict[str, Any] | None:
    """Returns the contents of the workdir's config.json; None if there is no such file.

    Raises:
      WorkdirError: the file is damaged.
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
    """Returns a finished run's results.json; None if it is missing or unreadable, because the run can rewrite it."""
    try:
        results = read_json(workdir / RESULTS)
        if results is None or {"step", "last", "best"} <= results.keys():
            return results
    except (WorkdirError, AttributeError):
        pass
    logger.warning("%s is damaged and is ignored", workdir / RESULTS)
    return None


def failed_seeds(workdir: pathlib.Path) -> dict[int, str]:
    """Returns the seeds of a finished run whose loss or gradient was not finite, with the reasons in results.json."""
    results = read_results(workdir) or {}
    return {int(seed): reason for seed, reason in results.get("failed", {}).items()}


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl, without damaged ones, such as a truncated last line."""
    return read_json_lines(workdir / METRICS)


def seed_line(line: dict[str, Any], seed: int | str) -> dict[str, Any]:
    """Returns a line of metrics.jsonl for one seed: with its own values in place of the means."""
    seeds = line.get("seeds", {})
    means = {name for values in seeds.values() for name in values}
    return {name: value for name, value in line.items() if name not in means} | seeds.get(str(seed), {})


def mean_line(line: dict[str, Any], failed: Collection[int]) -> dict[str, Any]:
    """Returns a line of metrics.jsonl with the means over the seeds that did not fail, then or later."""
    own = [values for seed, values in line.get("seeds", {}).items() if int(seed) not in failed]
    names = set.intersection(*map(set, own)) if own and failed else set()
    return line | {name: float(np.mean([values[name] for values in own])) for name in names}


def best_line(lines: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """Returns the evaluation with the highest accuracy, the later of equal ones; None if there is none."""
    evaluations = [line for line in lines if "eval_accuracy" in line]
    # Orbax keeps the later one too.
    return max(reversed(evaluations), key=lambda line: line["eval_accuracy"], default=None)


def best_step(lines: Sequence[dict[str, Any]]) -> int | None:
    """Returns the step of the best evaluation in metrics.jsonl by the seeds that the last one has; None without one."""
    evaluated = [line["seeds"] for line in lines if "seeds" in line and "eval_accuracy" in line]
    failed = {int(seed) for seeds in evaluated for seed in seeds if seed not in evaluated[-1]}
    best = best_line(mean_line(line, failed) for line in lines)
    return None if best is None else best["step"]


def plain(value: Any) -> Any:
    """Converts a config, or any nested mappings and sequences, to dicts and lists as in JSON."""
    if hasattr(value, "items"):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return value


@contextlib.contextmanager
def workdir_lock(workdir: pathlib.Path) -> Iterator[None]:
    """Locks the workdir for this process and those it trains with; the lock ends with the process.

    Raises:
      WorkdirError: another run holds it, or it is not a writable directory.
    """
    with parallel.together(), contextlib.ExitStack() as held:
        if parallel.is_primary():
            held.enter_context(_primary_lock(workdir))
        held = held.pop_all()
    with held:
        yield


@contextlib.contextmanager
def _primary_lock(workdir: pathlib.Path) -> Iterator[None]:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / ".lock", "a+", encoding="utf-8")
    except FileExistsError as error:
        raise WorkdirError(f"--workdir {workdir} is a file: name a directory") from error
    except OSError as error:
        raise WorkdirError(f"--workdir {workdir} cannot be written to: {error.strerror}; name another") from error
    with file:
        if not os.access(workdir, os.W_OK):  # the lock file may come from an earlier run
            raise WorkdirError(f"--workdir {workdir} cannot be written to: check its permissions, or name another")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise WorkdirError(
                f"another run (process {owner}) is training in {workdir}: "
                "wait for it, stop it, or name another --workdir"
            ) from error
        except OSError as error:  # network and cloud file systems may not support locks
            logger.warning("%s has no locks (%s): a file names the run that trains there", workdir, error.strerror)
            with _owned(workdir / ".owner"):
                yield
            return
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextlib.contextmanager
def _owned(path: pathlib.Path) -> Iterator[None]:
    """Holds a file that names this machine and process, unless it names another run that may still be active."""
    host = socket.gethostname()
    with contextlib.suppress(OSError, ValueError):
        before, _, pid = path.read_text(encoding="utf-8").rpartition(" ")
        if before == host and not runs(int(pid)):
            path.unlink()  # that run was killed
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(f"{host} {os.getpid()}")
    except FileExistsError as error:
        owner = path.read_text(encoding="utf-8", errors="replace").strip()
        raise WorkdirError(
            f"another run (machine and process {owner}) is training in {path.parent}: wait for it, or, if it ended, "
            f"delete {path}"
        ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def refuse_changes(
    stored: dict[str, Any] | None, config: Any, path: pathlib.Path, seeds: tuple[int, ...], *, resolved: bool
) -> None:
    """Raises ConfigError if the stored run has another config, or other seeds.

    Args:
      stored: the result of stored_config; None for no run.
      config: the config to resume with.
      path: the workdir.
      seeds: the seeds that train together.
      resolved: whether `config` is resolved; see changed_fields.
    """
    if not stored:
        return
    lines = changed_fields(stored, plain(config), resolved=resolved)
    before = tuple(stored.get("seeds", seeds[:1]))
    if before != seeds:
        lines.append(f"seeds that train together: {before} before, {seeds} now")
    if lines:
        raise ConfigError(
            f"{path} holds a run with another config ({'; '.join(lines)}): name another --workdir, or undo the change"
        )
    if resolved and (lines := changed_rounding(stored, plain(config))):  # once, and where the log has begun
        logger.warning("%s: the run resumes up to rounding, not bitwise", "; ".join(lines))


def saved_steps(path: pathlib.Path) -> list[int]:
    """Returns the steps of the workdir's checkpoints, oldest first, damaged ones included."""
    return sorted(int(entry.name) for entry in (path / CHECKPOINTS).glob("*") if entry.name.isdecimal())


def stored_config(path: pathlib.Path) -> dict[str, Any] | None:
    """Returns the config.json of the run to resume, or of the finished run; None if nothing was saved yet.

    Raises:
      WorkdirError: there are checkpoints or results, but no config.json, or one that is not a run's; or the results of
        a run without checkpoints are damaged.
    """
    steps, results = saved_steps(path), (path / RESULTS).is_file()
    stored = read_config(path) if (path / CONFIG).is_file() else None  # refuses one that is not a run's
    if not steps and not results:
        return None
    # A finished run's checkpoints may have been deleted to save space.
    if not steps and read_results(path) is None:
        raise WorkdirError(
            f"{path / RESULTS} is damaged, and there are no checkpoints: restore it, or name another --workdir"
        )
    if stored:
        return stored
    kept = "checkpoints" if steps else "results"
    raise WorkdirError(f"{path} has {kept} but no {CONFIG}: restore it, or name another --workdir")


def check_has_checkpoints(path: pathlib.Path) -> None:
    """Raises WorkdirError if there is nothing to evaluate."""
    if not saved_steps(path) or not (path / CONFIG).is_file():
        raise WorkdirError(
            f"there is no checkpoint in {path}: train first, or name the run with --workdir, or a file of weights with "
            "--config.model.init_from"
        )


def refuse_other_data(
    stored: dict[str, Any] | None,
    path: pathlib.Path,
    dataset: sources.Dataset | stream.StreamedDataset,
    fingerprint: str,
) -> None:
    """Raises ConfigError if the stored run (None for no run) saw other images, or saw them in another order."""
    if not stored:
        return
    streamed = is_streamed(dataset)
    if stored.get("streamed", False) != streamed:
        before, now = ("always", "held in memory"), ("never", "streamed")
        before, now = (before, now) if streamed else (now, before)
        raise ConfigError(
            f"{path} holds a run whose data set was {before[1]}, and now it would be {now[1]}, in another order: "
            f"set dataset.in_memory={before[0]}, or name another --workdir"
        )
    if stored["dataset_fingerprint"] != fingerprint:
        raise ConfigError(
            f"{path} was trained on other images than {dataset.name} has now: restore them, or name another workdir"
        )


def is_streamed(dataset: sources.Dataset | stream.StreamedDataset) -> bool:
    """Whether the data set is streamed, and so has another order than in memory."""
    return isinstance(dataset, stream.StreamedDataset)
