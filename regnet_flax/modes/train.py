"""Training and evaluation from a config and a workdir: where everything else is put together."""

from __future__ import annotations

import copy
import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from regnet_flax.analysis import plots
from regnet_flax.analysis.by_class import write_figures
from regnet_flax.command_line import Options
from regnet_flax.config import check as config_lib
from regnet_flax.config.resolve import resolve
from regnet_flax.data import sources, stream
from regnet_flax.errors import ConfigError, WorkdirError
from regnet_flax.files import read_json, write_json
from regnet_flax.modes.inputs import load, load_weights
from regnet_flax.training import parallel, workdir
from regnet_flax.training.checkpoint import Checkpoints
from regnet_flax.training.logs import RunLog
from regnet_flax.training.run import Run, collect_results, report
from regnet_flax.training.seeds import SeedsProgram, of_one, with_seed_axis
from regnet_flax.training.signals import StopSignals
from regnet_flax.training.streamed import StreamedProgram
from regnet_flax.training.trainer import AXIS, Program, build_model, build_optimizer, build_state, changed_rate
from regnet_flax.training.workdir import (
    check_has_checkpoints,
    refuse_changes,
    refuse_other_data,
    saved_steps,
    stored_config,
    workdir_lock,
)

logger = logging.getLogger("regnet_flax")


def pmap(function: Callable[..., Any], mapped: Sequence[int | None], devices: list[Any], donate: bool = False):
    """Runs `function` on every device's part; what it returns is the same on all of them.

    The state has no device axis, so checkpoints hold for any number of devices. That the result is the same everywhere
    is not checked: a forgotten mean over devices would pass in silence.

    With several processes pmap would take each process's own copy of every array and copy them all, the state too, to
    global ones and back at each call; there it is what pmap itself is made of, whose arrays stay global.
    """
    if jax.process_count() > 1:
        return shard_map(function, mapped, devices, donate)
    return jax.pmap(
        function,
        axis_name=AXIS,
        in_axes=tuple(mapped),
        out_axes=None,
        devices=devices,
        donate_argnums=(0,) if donate else (),
    )


def shard_map(function: Callable[..., Any], mapped: Sequence[int | None], devices: list[Any], donate: bool = False):
    """As `pmap`, for arrays that are global: over all processes' devices."""

    def local(*args):
        parts = [
            arg if axis is None else jax.tree.map(lambda a, axis=axis: a.squeeze(axis), arg)
            for arg, axis in zip(args, mapped, strict=True)
        ]
        return function(*parts)

    specs = tuple(PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, AXIS) for axis in mapped)
    mesh = Mesh(np.array(devices), (AXIS,))
    mapped_local = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    return jax.jit(mapped_local, donate_argnums=(0,) if donate else ())


def make_program(
    config: Any,
    dataset: sources.Dataset | stream.StreamedDataset,
    devices: list[Any],
    start: dict[str, Any] | None,
    seeds: Sequence[int] = (),
) -> Program:
    """The program of a resolved config."""
    if isinstance(dataset, stream.StreamedDataset):
        return StreamedProgram(config, dataset, devices, pmap, start)
    if len(seeds) > 1:
        together = config.compare.together
        return SeedsProgram(config, dataset, devices, pmap, start, seeds=seeds, together=together)
    return Program(config, dataset, devices, pmap, start)


def train_and_evaluate(
    config: Any,
    path: str | pathlib.Path,
    devices: list[Any] | None = None,
    seeds: Sequence[int] = (),
    *,
    profile: bool = False,
) -> dict[str, Any]:
    """Trains, or goes on with, the run of a workdir.

    Args:
      config: a nested config with the fields of configs/base.py.
      path: the workdir. A run that it holds is gone on with; a finished one is only reported.
      devices: to train on; all by default, those of other processes too.
      seeds: several train together, each as it would alone, and what is logged are means and each seed's own values;
        by default the config's seed, in whose place a single one given here is taken.
      profile: whether a trace of a few steps goes into `<workdir>/profile`.

    Returns:
      What results.json holds.

    Raises:
      ConfigError: wrong values, or others than those the workdir's run began with.
      DataError: the data set is missing or unreadable.
      WorkdirError: the workdir cannot be used.
      CheckpointError: the workdir has checkpoints, and none can be read.
      NonFiniteError: the loss or a gradient is not finite.
      Interrupted: stopped by a signal, after saving.
      ProcessError: another process failed, or has another config, workdir or data set.
    """
    path, devices = pathlib.Path(path), devices or jax.devices()
    config, seeds = copy.deepcopy(config), tuple(seeds) or (config.seed,)
    config.seed = seeds[0]
    if len(seeds) > 1:
        config.compare.seeds = seeds
    with parallel.together():
        config_lib.check_config(config)
        # Before the first checkpoint there is nothing that another config would spoil.
        stored = stored_config(path)
        refuse_changes(stored, config, path, seeds, resolved=False)
        results = workdir.read_results(path) if stored else None
    here = dict(config_lib.flatten(config)) | {"dataset.data_dir": ""}  # which each machine may have elsewhere
    parallel.check_same("config", here)
    parallel.check_same("workdir", [str(path.resolve()), stored, results])
    if stored and results and all(stored["train"][name] == config.train[name] for name in ("max_steps", "epochs")):
        logger.info("%s holds a finished run", path)
        report(results, path)
        return results

    config_lib.check_config(config, len(devices))
    with StopSignals() as stop, RunLog() as log:
        with parallel.together():
            dataset = load(config)
            fingerprint = dataset.fingerprint()
        parallel.check_same("data set", fingerprint)
        batch, images = config.train.batch_size, dataset.size("train")
        if batch > images:
            raise ConfigError(
                f"train.batch_size is {batch}: {dataset.name} has {images} training images, so it must be at most "
                f"that, as with --config.train.batch_size={2 ** (images.bit_length() - 1)}"
            )
        streamed = isinstance(dataset, stream.StreamedDataset)
        refuse_other_data(stored, path, dataset, fingerprint)
        if streamed and len(seeds) > 1:
            raise ConfigError(
                f"{dataset.name} is streamed, and several seeds train together on a data set in memory only: "
                "set dataset.in_memory=always, or compare.seeds to one"
            )
        config = resolve(config, dataset)
        refuse_changes(stored, config, path, seeds, resolved=True)
        if stored and (rate := changed_rate(config, stored["train"]["epochs"], images // batch, saved_steps(path)[-1])):
            raise ConfigError(
                f"{path} holds a run of train.epochs={stored['train']['epochs']}, now {config.train.epochs}: {rate}; "
                "name another --workdir, or undo the change"
            )
        with parallel.together():
            start = load_weights(config)
        stop.check()
        with workdir_lock(path):
            with parallel.together():
                if stored_config(path) != stored:
                    raise WorkdirError(f"{path} was changed by another run just now: run the same command again")
            record = {
                "class_names": list(dataset.class_names),
                "image_shape": list(dataset.image_shape),
                "streamed": streamed,
                "dataset_fingerprint": fingerprint,
            }
            if len(seeds) > 1:
                record["seeds"] = list(seeds)
            if parallel.is_primary():
                # Of a run that is to go on: it would pass for finished if it were stopped now.
                (path / workdir.RESULTS).unlink(missing_ok=True)
                write_json(path / workdir.CONFIG, workdir.plain(config) | record)
                log.write_to(path)
            checkpoints = Checkpoints(path, config.checkpoint.keep, config.checkpoint.keep_best)
            try:
                logger.info(
                    "%s%s on %d × %s, %s; the first step takes longer, since it is compiled",
                    config.model.name,
                    f", seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else "",
                    len(devices),
                    devices[0].device_kind,
                    config.dtype,
                )
                program = make_program(config, dataset, devices, start, seeds)
                run = Run(config, path, program, checkpoints, stop, profile)
                run.run()
                checkpoints.wait()
                outcomes = run.outcomes(dataset.size("test")) if config.eval.every_epochs else None
                if parallel.is_primary():
                    results = collect_results(run, config, path)
                    figures, title = path / workdir.FIGURES, f"{config.model.name} on {dataset.name}"
                    if len(seeds) > 1:
                        title += f", seed {config.seed}"
                    figures.mkdir(exist_ok=True)
                    if outcomes is not None:
                        results["per_class"] = write_figures(figures, dataset, outcomes, title, config.seed)
                    plots.curves(
                        workdir.read_metrics(path),
                        figures / "curves.png",
                        title=title,
                        drops=program.drops,
                    )
                    # Last, since it is what marks the run as finished.
                    write_json(path / workdir.RESULTS, results)
                    report(results, path)
                results = parallel.from_primary(results)
            finally:
                checkpoints.close()
    return results


def _read_checkpoint(config: Any, path: pathlib.Path, like: Any) -> tuple[int, Any]:
    """The step and the state of the checkpoint `eval.checkpoint`; of several seeds, that of the config's."""
    seeds = read_json(path / workdir.CONFIG).get("seeds", [])
    if seeds:
        if config.seed not in seeds:
            raise ConfigError(f"seed is {config.seed}: {path} has the seeds {', '.join(map(str, seeds))}")
        like = with_seed_axis(like, len(seeds))
    checkpoints = Checkpoints(path, config.checkpoint.keep, config.checkpoint.keep_best)
    try:
        step, state = checkpoints.read(str(config.eval.checkpoint), like)
    finally:
        checkpoints.close()
    return step, of_one(state, seeds.index(config.seed)) if seeds else state


def load_trained(config: Any, path: str | pathlib.Path) -> tuple[Any, dict[str, Any], int]:
    """The model of a workdir, and the variables of its checkpoint `eval.checkpoint`; no data set is read.

    Args:
      config: the workdir's.
      path: the workdir.

    Returns:
      The model, its "params" and "batch_stats" (the averages where it keeps them), and the step.

    Raises:
      ConfigError, WorkdirError, CheckpointError: see train_and_evaluate.
    """
    path = pathlib.Path(path)
    config_lib.check_config(config)
    check_has_checkpoints(path)
    image_shape = (workdir.read_config(path) or {})["image_shape"]
    model, (_, tx) = build_model(config), build_optimizer(config, 1)
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        jax.eval_shape(lambda: build_state(model, tx, image_shape, config.seed, config.optimizer.ema_decay > 0)),
    )
    step, state = _read_checkpoint(config, path, like)
    return model, state.variables, step


def evaluate_only(config: Any, path: str | pathlib.Path, devices: list[Any] | None = None) -> dict[str, float]:
    """Evaluates the checkpoint `eval.checkpoint` of a workdir, or the file `model.init_from`, on the test split.

    Leaves eval.json and figures/eval/ in the workdir; those of training stay as they are.

    Args:
      config: the workdir's, its values to be overridden at will.
      path: the workdir.
      devices: to evaluate on; all by default, those of other processes too.

    Returns:
      "step", "loss", "accuracy", "top5_accuracy" where there are more than five classes, and "count".

    Raises:
      ConfigError, DataError, CheckpointError: see train_and_evaluate.
    """
    path, devices = pathlib.Path(path), devices or jax.devices()
    with parallel.together():
        config_lib.check_config(config)
        if not config.model.init_from:
            check_has_checkpoints(path)
        dataset = load(config)
    parallel.check_same("data set", dataset.fingerprint())
    if not config.model.init_from:
        trained = tuple((workdir.read_config(path) or {})["class_names"])
        if trained != dataset.class_names:
            raise ConfigError(
                f"{dataset.name} has the classes {', '.join(dataset.class_names)}, but {path} was trained on "
                f"{', '.join(trained)}: evaluate it on images of these"
            )
    config = resolve(config, dataset)
    program = make_program(config, dataset, devices, load_weights(config))
    if config.model.init_from:
        step, state = 0, program.initial_state()
    else:
        step, state = _read_checkpoint(config, path, program.like)
    outcomes = np.empty((dataset.size("test"), 2), np.int32)
    metrics = {"step": step} | program.evaluate(state, outcomes=outcomes)
    top5 = f", top-5 {metrics['top5_accuracy']:.2%}" if "top5_accuracy" in metrics else ""
    logger.info(
        "step %d: test loss %.4f, accuracy %.2f %%%s, over %d images",
        step,
        metrics["loss"],
        100 * metrics["accuracy"],
        top5,
        metrics["count"],
    )
    if parallel.is_primary():
        figures = path / workdir.FIGURES / "eval"
        title = f"{config.model.name} on {dataset.name}, {config.model.init_from or f'step {step}'}"
        try:
            by_class = write_figures(figures, dataset, outcomes, title, config.seed)
            write_json(path / workdir.EVAL, metrics | {"per_class": by_class})
        except OSError as error:  # as in a workdir that another user owns, or on a full disk
            logger.warning("%s and the pictures cannot be written: %s", path / workdir.EVAL, error.strerror)
        else:
            logger.info("by class: %s, pictures: %s", path / workdir.EVAL, figures)
    return metrics


def run(config: Any, options: Options) -> None:
    """Trains, or resumes, the workdir's run; see `train_and_evaluate`."""
    train_and_evaluate(config, options.workdir, profile=options.profile)
