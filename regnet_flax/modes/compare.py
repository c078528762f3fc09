"""--mode compare: trains several models × several seeds on one data set, except finished ones; writes the report."""

from __future__ import annotations

import copy
import gc
import logging
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from rich.table import Table

from regnet_flax.analysis import report
from regnet_flax.command_line import Options
from regnet_flax.config.check import check_config
from regnet_flax.data.folder.listing import is_divided
from regnet_flax.errors import ConfigError, Interrupted, NonFiniteError
from regnet_flax.models.registry import parse_variant
from regnet_flax.modes.train import train_and_evaluate
from regnet_flax.places import fetch_data
from regnet_flax.trackers.registry import check_installed
from regnet_flax.training.display import say_table
from regnet_flax.training.signals import StopSignals
from regnet_flax.training.workdir import RESULTS, saved_steps, workdir_lock

logger = logging.getLogger("regnet_flax")


def label(variant: str) -> str:
    """Returns a variant's name in reports; `folder` derives the name of its run's folder from it."""
    name, options = parse_variant(variant)
    return " ".join([name, *(f"{option}={value}".replace(" ", "") for option, value in sorted(options.items()))])


def folder(variant: str) -> str:
    """Returns the name of a variant's folder in the comparison, such as "regnet20_convlstm-regulated_stages-1-2"."""
    return re.sub(r"\W+", "-", label(variant).replace("=()", "=none")).strip("-")


def variant_config(config: Any, variant: str) -> Any:
    """Returns the config of one variant's run: its options replace those of `model.overrides`."""
    config = copy.deepcopy(config)
    config.model.name, options = parse_variant(variant)
    for option, value in options.items():
        config.model.overrides[option] = value
    return config


def compare(config: Any, path: str | pathlib.Path, train: Callable[..., dict[str, Any]]) -> None:
    """Trains every model of `compare.models` with every seed of `compare.seeds`, and writes report.md and report.html.

    Args:
      config: a nested config with the fields of configs/base.py.
      path: the workdir of the comparison, with a workdir for each model, or for each of its seeds. Finished runs are
        not repeated.
      train: `train.train_and_evaluate`, or a replacement for it in a test.

    Raises:
      ConfigError: values are wrong, or differ from those that a model's run began with.
      NonFiniteError: some models failed; raised after the others are trained and the report is written.
      Interrupted: a signal stopped the comparison, after saving.
      DataError, WorkdirError, CheckpointError: see train.
    """
    path = pathlib.Path(path)
    check_config(config)
    variants, seeds = config.compare.models, config.compare.seeds
    if not variants or not seeds:
        field, example = ("seeds", "(0, 1, 2)") if variants else ("models", "('resnet20', 'regnet20_convlstm')")
        raise ConfigError(f"compare.{field} is (): name some, such as {example}, or take configs/compare_digits.py")
    if not config.eval.every_epochs:
        raise ConfigError("eval.every_epochs is 0: models are compared by their test error, so it must be at least 1")
    apart = config.compare.together == "apart"
    if apart and (reason := _divided_by_seed(config.dataset)):
        raise ConfigError(
            f"compare.together is apart: {reason}, so each seed would be tested on other images; leave "
            "compare.together as it is by default"
        )
    for variant in variants:
        _check_together(path / folder(variant), apart)
    check_installed(config.log.trackers)
    runs: dict[str, list[pathlib.Path]] = {}
    failed: dict[str, str] = {}
    with workdir_lock(path), StopSignals() as stop:
        for number, variant in enumerate(variants, 1):
            logger.info("model %d of %d: %s", number, len(variants), label(variant))
            for name, workdir, own in _runs(config, variant, path):
                if stop.received is not None:
                    raise Interrupted(stop.received, f"{stop.cause} between two runs; run the same command to resume.")
                try:
                    train(variant_config(config, variant), workdir, seeds=own)
                except NonFiniteError as error:
                    logger.error("%s: %s", name, error)
                    failed[name] = str(error)
                else:
                    runs.setdefault(label(variant), []).append(workdir)
            # JAX's caches hold the run's compiled functions, and with them its data set on the device.
            jax.clear_caches()
            gc.collect()
        if runs:
            say_table(_table(report.write(path, runs, failed)))
            logger.info("report: %s and %s", path / report.MARKDOWN, path / report.HTML)
    if failed:
        kind, count = "models", len(variants)
        if config.compare.together == "apart":
            kind, count = "runs", count * len(seeds)
        raise NonFiniteError(f"{len(failed)} of {count} {kind} failed: {'; '.join(failed)}")


def _divided_by_seed(data: Any) -> str:
    """Says why the seed determines the test images; "" if it does not."""
    if data.name == "synthetic":
        return "synthetic images depend on the seed"
    if data.name == "folder" and os.path.isdir(place := fetch_data(os.path.expanduser(data.data_dir), "")):
        return "" if is_divided(place) else f"{data.data_dir} has no train/ and test/"
    return ""


def _check_together(workdir: pathlib.Path, apart: bool) -> None:
    others = [workdir] if apart else list(workdir.glob("seed*"))
    if any(saved_steps(other) or (other / RESULTS).is_file() for other in others):
        raise ConfigError(
            f"compare.together is {'apart' if apart else 'not apart'}, and {workdir} holds seeds that were trained "
            f"{'together' if apart else 'apart'}: undo the change, or name another --workdir"
        )


def _runs(config: Any, variant: str, path: pathlib.Path) -> Iterator[tuple[str, pathlib.Path, tuple[int, ...]]]:
    """Yields the label, workdir and seeds of each run of a variant."""
    workdir, seeds = path / folder(variant), config.compare.seeds
    if config.compare.together == "apart":
        yield from ((f"{label(variant)}, seed {seed}", workdir / f"seed{seed}", (seed,)) for seed in seeds)
    else:
        yield label(variant), workdir, seeds


def _table(cells: Sequence[Sequence[str]]) -> Table:
    head, *rows = cells
    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    return table


def run(config: Any, options: Options) -> None:
    """Compares the models of `compare.models`; see `compare`."""
    compare(config, options.workdir, train_and_evaluate)
