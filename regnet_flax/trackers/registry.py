"""Opens the trackers of `log.trackers`, guards the run against their failures, and stores the ids of their runs."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

from regnet_flax.errors import ConfigError, WorkdirError, one_line
from regnet_flax.files import read_json, write_json
from regnet_flax.models.plugins import import_plugins

IDS = "trackers.json"  # in the workdir, {"wandb": {"0": "the id of seed 0's run"}}
TENSORBOARD = "tensorboard"
PROJECT = "regnet_flax"  # or experiment

# The names of config.fields.TRACKERS.
SHIPPED = {
    TENSORBOARD: "tensorboard:TensorBoard",
    "wandb": "services:Wandb",
    "mlflow": "services:Mlflow",
    "trackio": "services:Trackio",
}

logger = logging.getLogger("regnet_flax")


class Start(NamedTuple):
    """The argument of a tracker's constructor.

    Attributes:
      workdir: the run's.
      name: a title for the run: the workdir's name, with the seed if several seeds train together.
      group: the workdir's name if several seeds train together, otherwise "".
      id: the tracker's id from when the run began; "" for a new run.
      step: the first step that will be logged. A killed run may have logged it before.
    """

    workdir: pathlib.Path
    name: str
    group: str
    id: str
    step: int


class Tracker(Protocol):
    """One run in a tracker. Its class is called with a `Start`, in process 0 only.

    At its first exception, the tracker is dropped with a warning until the run resumes, and training continues.

    Attributes:
      id: identifies the run when it resumes; stored in the workdir's trackers.json. "" if there is none.
    """

    id: str

    def config(self, values: Mapping[str, Any]) -> None:
        """Records the resolved config, {"train.batch_size": 128, …}; called once, also when a run resumes."""
        ...

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Records the metrics of a step, {"train/loss": 0.5, "eval/accuracy": 0.9, …}; all values are finite."""
        ...

    def finish(self, error: str) -> None:
        """Ends the run; `error` is "" if training is complete, otherwise the error or signal that stopped it."""
        ...


def check_installed(names: Sequence[str]) -> None:
    """Raises ConfigError, with a message of one line, if a tracker of `log.trackers` cannot be imported.

    TensorBoard, the default, is not checked: without tensorboardX a run only warns.
    """
    for name in names:
        if ":" in name:
            _own_class(name)
        elif name != TENSORBOARD and not _is_installed(name):
            raise ConfigError(
                f"log.trackers has {name!r}, and the package {name} is not installed: "
                f'pip install "regnet-flax[{name}]", or leave it out'
            )


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a folder wandb/ that W&B writes can be imported too


def _own_class(location: str) -> Callable[[Start], Tracker]:
    module, _, name = location.partition(":")
    try:
        import_plugins([module])
    except ValueError as error:
        raise ConfigError(f"log.trackers: {error}") from error
    found: Any = getattr(importlib.import_module(module), name, None)
    if callable(found):
        return cast(Callable[[Start], Tracker], found)
    raise ConfigError(f"log.trackers has {location!r}, and {module} has no class {name}: correct the name")


def _class_of(name: str) -> Callable[[Start], Tracker]:
    if name not in SHIPPED:
        return _own_class(name)
    module, _, found = SHIPPED[name].partition(":")
    return getattr(importlib.import_module(f"regnet_flax.trackers.{module}"), found)


class GuardedTracker:
    """Runs a tracker, and drops it with a warning at its first failure.

    TensorBoard is an exception. Its file belongs to the workdir, so a write error, such as a full disk, ends the run as
    it does for metrics.jsonl.

    Args:
      name: an entry of `log.trackers`.
      start: the tracker's argument.
      config: the resolved config, flat.
    """

    def __init__(self, name: str, start: Start, config: Mapping[str, Any]):
        self._name, self._tracker, self.id = name, None, start.id
        if name == TENSORBOARD:
            try:
                self._tracker = _class_of(name)(start)
            except ImportError:
                logger.warning("tensorboardX is not installed: no TensorBoard events are written")
            return
        with self._guarded():
            self._tracker = _class_of(name)(start)
            self.id = str(self._tracker.id)
            self._tracker.config(config)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:
            if self._name == TENSORBOARD:
                raise
            self._tracker = None
            logger.warning(
                "log.trackers: %s failed and is left out until the run resumes; training continues (%s)",
                self._name,
                one_line(error),
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker.log`."""
        if self._tracker is not None:
            with self._guarded():
                self._tracker.log(step, values)

    def finish(self, error: str) -> None:
        """See `Tracker.finish`; a second call does nothing."""
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            with self._guarded():
                tracker.finish(error)


def open_trackers(
    names: Sequence[str], workdir: pathlib.Path, step: int, config: Mapping[str, Any], seeds: Sequence[int]
) -> list[tuple[int | None, GuardedTracker]]:
    """Returns the trackers of a run, each with the seed that it records, or None for the means over all seeds.

    TensorBoard has one file per workdir. In other trackers, each of several seeds is a run of its own.

    Args:
      names: `log.trackers`.
      workdir: the run's directory; its trackers.json has the ids of the runs to continue.
      step: the first step that will be logged.
      config: the resolved config, flat.
      seeds: the seeds that train together, or one.
    """
    ids, several, opened = _read_ids(workdir), len(seeds) > 1, []
    for name in names:
        if name == TENSORBOARD:
            opened.append((None, GuardedTracker(name, Start(workdir, workdir.name, "", "", step), config)))
            continue
        for seed in seeds:
            title, group = (f"{workdir.name} seed {seed}", workdir.name) if several else (workdir.name, "")
            start = Start(workdir, title, group, ids.get(name, {}).get(str(seed), ""), step)
            tracker = GuardedTracker(name, start, dict(config) | {"seed": seed})
            if tracker.id != start.id:
                ids.setdefault(name, {})[str(seed)] = tracker.id
                write_json(workdir / IDS, ids)
            opened.append((seed if several else None, tracker))
    return opened


def _read_ids(workdir: pathlib.Path) -> dict[str, dict[str, str]]:
    try:
        if (ids := read_json(workdir / IDS)) is None:
            return {}
        return {str(name): {str(seed): str(run) for seed, run in runs.items()} for name, runs in ids.items()}
    except (WorkdirError, AttributeError):
        logger.warning("%s is damaged: trackers start new runs", workdir / IDS)
        return {}
