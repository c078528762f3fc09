"""What a workdir holds of a run, and whether that run may be gone on with."""

from __future__ import annotations

import pathlib
from typing import Any

from regnet_flax.config import ConfigError, changed_fields
from regnet_flax.data import sources, streaming
from regnet_flax.training import workdir
from regnet_flax.training.checkpoint import CHECKPOINTS
from regnet_flax.training.interrupt import WorkdirError


def refuse_changes(
    stored: dict[str, Any] | None, config: Any, path: pathlib.Path, seeds: tuple[int, ...], *, resolved: bool
) -> None:
    """Raises ConfigError if the stored run has another config, or other seeds; None is no run.

    Args:
      stored: what stored_config gave.
      config: the config to go on with.
      path: the workdir.
      seeds: that train together.
      resolved: whether `config` is resolved; see changed_fields.
    """
    if not stored:
        return
    lines = changed_fields(stored, workdir.plain(config), resolved=resolved)
    before = tuple(stored.get("seeds", seeds[:1]))
    if before != seeds:
        lines.append(f"seeds that train together: {before} before, {seeds} now")
    if lines:
        raise ConfigError(
            f"{path} holds a run with another config ({'; '.join(lines)}): name another --workdir, or undo the change"
        )


def saved_steps(path: pathlib.Path) -> list[int]:
    """The steps of the workdir's checkpoints, whole or not, oldest first."""
    return sorted(int(entry.name) for entry in (path / CHECKPOINTS).glob("*") if entry.name.isdecimal())


def stored_config(path: pathlib.Path) -> dict[str, Any] | None:
    """What config.json says of the run that is to be gone on with; None where nothing was saved yet.

    Raises:
      WorkdirError: there are checkpoints, and no config.json.
    """
    if not saved_steps(path):
        return None
    if stored := workdir.read_config(path):
        return stored
    raise WorkdirError(f"{path} has checkpoints and no {workdir.CONFIG}: restore it, or name another --workdir")


def check_has_checkpoints(path: pathlib.Path) -> None:
    """Raises WorkdirError if there is nothing to evaluate."""
    if not saved_steps(path) or not (path / workdir.CONFIG).is_file():
        raise WorkdirError(f"there is no checkpoint in {path}: train first, or name the run with --workdir")


def refuse_other_data(
    stored: dict[str, Any] | None,
    path: pathlib.Path,
    dataset: sources.Dataset | streaming.StreamedDataset,
    fingerprint: str,
) -> None:
    """Raises ConfigError if the stored run, None for none, saw other images, or in another order."""
    if not stored:
        return
    streamed = isinstance(dataset, streaming.StreamedDataset)
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
