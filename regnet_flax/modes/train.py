"""--mode train: trains and evaluates from a config and a workdir; combines all the other modules."""

from __future__ import annotations

import contextlib
import copy
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from regnet_flax.analysis.by_class import write_figures
from regnet_flax.analysis.plots import training
from regnet_flax.command_line import Options
from regnet_flax.config.check import check_config, eval_batch_size, flatten
from regnet_flax.config.resolve import resolve
from regnet_flax.errors import ConfigError, WorkdirError
from regnet_flax.files import dataset_title, write_json
from regnet_flax.modes.setup.datasets import Dataset, open_dataset
from regnet_flax.modes.setup.models import load_weights
from regnet_flax.modes.setup.trainers import make_plan, make_trainer
from regnet_flax.places import in_workdir
from regnet_flax.results import collect_results, report
from regnet_flax.trackers.registry import check_installed
from regnet_flax.training import parallel, workdir
from regnet_flax.training.checkpoint import Checkpoints
from regnet_flax.training.display import working
from regnet_flax.training.logs import RunLog
from regnet_flax.training.optimizer import changed_rate
from regnet_flax.training.run import Run, averaged
from regnet_flax.training.signals import StopSignals

logger = logging.getLogger("regnet_flax")

Stored = dict[str, Any] | None


@in_workdir
def train_and_evaluate(
    config: Any,
    path: str | pathlib.Path,
    devices: list[Any] | None = None,
    seeds: Sequence[int] = (),
    *,
    profile: bool = False,
) -> dict[str, Any]:
    """Trains the run of a workdir, or resumes it.

    Args:
      config: a nested config with the fields of configs/base.py.
      path: the workdir, which may be in a bucket. If it holds an interrupted run, the run resumes; a finished run is
        only reported.
      devices: the devices to train on; by default all, including those of other processes.
      seeds: the seeds; a single one replaces the config's, which is the default. Several train together, each as it
        would alone; the log has the means and each seed's own values. All of them use the images that
        `dataset.validation` holds out for the first.
      profile: whether to write a trace of a few steps to `<workdir>/profile`.

    Returns:
      The contents of results.json.

    Raises:
      ConfigError: values are wrong, or differ from those that the workdir's run began with.
      DataError: the data set is missing or unreadable.
      WorkdirError, PlaceError: the workdir cannot be used.
      CheckpointError: the workdir has checkpoints, but none can be read.
      NonFiniteError: the loss or a gradient is not finite; with several seeds, for all of them.
      Interrupted: a signal stopped the run, after saving.
      ProcessError: another process failed, or has another config, workdir or data set.
    """
    path, devices = pathlib.Path(path), devices or jax.devices()
    config, seeds = _settle_seeds(config, seeds)
    stored, results = _stored_run(config, path, seeds)
    if results:
        _open_dataset(config, stored, path)  # checks that the results belong to this data set
        logger.info("%s holds a finished run", path)
        if profile:
            logger.warning("there is no trace: --profile traces steps, and this run has none left")
        report(results, path)
        return results
    check_config(config, len(devices))
    with parallel.together():
        if parallel.is_primary():
            check_installed(config.log.trackers)
    with StopSignals() as stop, RunLog() as log, contextlib.ExitStack() as shown:
        shown.callback(working, "")
        working(f"reading {config.dataset.name}")
        dataset, fingerprint = _open_dataset(config, stored, path)
        with parallel.together():
            config = _complete_config(config, dataset, stored, path, seeds)
            # A resumed run no longer needs its initial weights, and the file may have been moved.
            start = None if stored else load_weights(config, dataset.image_shape[-1])
        stop.check()
        with workdir.workdir_lock(path):
            _check_unchanged(stored, path)
            if parallel.is_primary():
                _begin_workdir(config, dataset, fingerprint, path, seeds)
                log.write_to(path)
            _announce(config, devices, seeds)
            working("compiling")
            with contextlib.ExitStack() as ends:
                checkpoints = Checkpoints(path, config.checkpoint.keep, config.checkpoint.keep_best)
                ends.callback(checkpoints.close)
                trainer = make_trainer(config, dataset, devices, seeds, start)
                ends.callback(trainer.close)
                plan = make_plan(config, dataset.size("train"))
                split = dataset.evaluated
                trainer.compile_ahead(split, dataset.size(split), eval_batch_size(config))
                run = Run(config, path, trainer, plan, dataset, checkpoints, stop, profile)
                run.run()
                checkpoints.wait()
                return _finish(run, config, dataset, checkpoints, path)


def _settle_seeds(config: Any, seeds: Sequence[int]) -> tuple[Any, tuple[int, ...]]:
    config, seeds = copy.deepcopy(config), tuple(seeds) or (config.seed,)
    config.seed = seeds[0]
    if len(seeds) > 1:
        config.compare.seeds = seeds
    return config, seeds


def _stored_run(config: Any, path: pathlib.Path, seeds: tuple[int, ...]) -> tuple[Stored, dict[str, Any] | None]:
    """Returns the config.json of the run to resume, and its results if it is finished; refuses another config."""
    with parallel.together():
        check_config(config)
        # Before the first checkpoint another config does no harm.
        stored = workdir.stored_config(path)
        workdir.refuse_changes(stored, config, path, seeds, resolved=False)
        results = workdir.read_results(path) if stored else None
    here = dict(flatten(config)) | {"dataset.data_dir": ""}  # may differ between machines
    parallel.check_same("config", here)
    parallel.check_same("workdir", [str(path.resolve()), stored, results])
    if stored and results and any(stored["train"][name] != config.train[name] for name in ("max_steps", "epochs")):
        if not workdir.saved_steps(path):
            raise WorkdirError(
                f"{path} holds a finished run without checkpoints, so it cannot be trained longer: restore its "
                f"{workdir.CHECKPOINTS}/, name another --workdir, or undo the change of train.epochs or train.max_steps"
            )
        results = None
    return stored, results


def _open_dataset(config: Any, stored: Stored, path: pathlib.Path) -> tuple[Dataset, str]:
    """Returns the data set and its fingerprint; refuses a data set that differs from the stored run's."""
    with parallel.together():
        dataset = open_dataset(config)
        fingerprint = dataset.fingerprint()
    parallel.check_same("data set", fingerprint)
    batch, images = config.train.batch_size, dataset.size("train")
    if batch > images:
        raise ConfigError(
            f"train.batch_size is {batch}: {dataset.name} has {images} training images, so it must be at most "
            f"that, as with --config.train.batch_size={2 ** (images.bit_length() - 1)}"
        )
    workdir.refuse_other_data(stored, path, dataset, fingerprint)
    return dataset, fingerprint


def _complete_config(config: Any, dataset: Dataset, stored: Stored, path: pathlib.Path, seeds: tuple[int, ...]) -> Any:
    """Returns the resolved config; refuses a config that differs from the stored run's."""
    config = resolve(config, dataset)
    workdir.refuse_changes(stored, config, path, seeds, resolved=True)
    if stored:
        epochs, steps_per_epoch = stored["train"]["epochs"], dataset.size("train") // config.train.batch_size
        if rate := changed_rate(config, epochs, steps_per_epoch, workdir.saved_steps(path)[-1]):
            raise ConfigError(
                f"{path} holds a run of train.epochs={epochs}, now {config.train.epochs}: {rate}; "
                "name another --workdir, or undo the change"
            )
        taken, total = workdir.saved_steps(path)[-1], make_plan(config, dataset.size("train")).total_steps
        if total < taken:
            raise ConfigError(
                f"{path} holds a run that has taken {taken} steps, and train.epochs and train.max_steps would now end "
                f"it at step {total}: undo the change, or name another --workdir"
            )
    return config


def _check_unchanged(stored: Stored, path: pathlib.Path) -> None:
    with parallel.together():
        if workdir.stored_config(path) != stored:
            raise WorkdirError(f"{path} was changed by another run just now: run the same command again")


def _begin_workdir(config: Any, dataset: Dataset, fingerprint: str, path: pathlib.Path, seeds: tuple[int, ...]) -> None:
    # An earlier results.json would make the resumed run look finished if it were stopped now.
    (path / workdir.RESULTS).unlink(missing_ok=True)
    record = {
        "class_names": list(dataset.class_names),
        "image_shape": list(dataset.image_shape),
        "streamed": workdir.is_streamed(dataset),
        "evaluated": dataset.evaluated,
        "dataset_fingerprint": fingerprint,
    }
    if len(seeds) > 1:
        record["seeds"] = list(seeds)
    write_json(path / workdir.CONFIG, workdir.plain(config) | record)


def _announce(config: Any, devices: list[Any], seeds: tuple[int, ...]) -> None:
    logger.info(
        "%s%s on %d × %s, %s; the first step takes longer, since it is compiled",
        config.model.name,
        f", seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else "",
        len(devices),
        devices[0].device_kind,
        config.dtype,
    )


def _finish(run: Run, config: Any, dataset: Dataset, checkpoints: Checkpoints, path: pathlib.Path) -> dict[str, Any]:
    """Does the remaining evaluations, and writes results and figures."""
    test, outcomes = None, None
    if dataset.validation is not None:
        # The test split is read once, with the checkpoint that the validation split chose.
        step, variables = checkpoints.read_variables("best", run.placement.replicated)
        metrics, outcomes = run.outcomes(variables, "test")
        metrics = {f"test_{name}": value for name, value in metrics.items() if name != "count"}
        test = averaged({"step": step} | metrics, run.seeds, run.failed)
    elif config.eval.every_epochs:
        _, outcomes = run.outcomes(run.state.variables, "test")
    results = None
    if parallel.is_primary():
        results = collect_results(run, config, path, test)
        figures, title = path / workdir.FIGURES, f"{config.model.name} on {dataset_title(config.dataset)}"
        if len(run.seeds) > 1:
            title += f", seed {run.left[0]}"
        figures.mkdir(exist_ok=True)
        if outcomes is not None:
            results["per_class"] = write_figures(figures, dataset, outcomes, title, config.seed)
        lines, picture = workdir.read_metrics(path), figures / "curves.png"
        training.curves(lines, picture, title=title, drops=run.plan.drops, split=dataset.evaluated)
        # Last, because it marks the run as finished.
        write_json(path / workdir.RESULTS, results)
        report(results, path)
    return parallel.from_primary(results)


def run(config: Any, options: Options) -> None:
    """Trains, or resumes, the workdir's run; see `train_and_evaluate`."""
    train_and_evaluate(config, options.workdir, profile=options.profile)
