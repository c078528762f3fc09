"""Training and evaluation from a config and a workdir: where everything else is put together."""

from __future__ import annotations

import copy
import logging
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from regnet_flax import config as config_lib
from regnet_flax import torch_port, weights
from regnet_flax.analysis import plots
from regnet_flax.data import sources, streaming
from regnet_flax.training import processes, workdir
from regnet_flax.training.checkpoint import CHECKPOINTS, Checkpoints
from regnet_flax.training.figures import write_figures
from regnet_flax.training.interrupt import StopSignals, WorkdirError, workdir_lock
from regnet_flax.training.program import AXIS, Program, build_model, build_optimizer, build_state, changed_rate
from regnet_flax.training.progress import duration
from regnet_flax.training.run import Run, collect_results, report
from regnet_flax.training.seeds import SeedsProgram, of_one, with_seed_axis
from regnet_flax.training.streamed import StreamedProgram

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


def load(config: Any) -> sources.Dataset | streaming.StreamedDataset:
    """The config's data set, in memory or to be streamed; says which images could not be read."""
    began = time.monotonic()
    settings = config.dataset
    options = {name: settings[name] for name in ("data_dir", "image_size", "num_classes", "strict")}
    dataset = streaming.open_stream(settings.name, in_memory=settings.in_memory, augment=settings.augment, **options)
    streamed = dataset is not None
    if dataset is None:
        dataset = sources.load_dataset(settings.name, seed=config.seed, **options)
    if streamed and config.train.steps_per_call > 1:
        raise config_lib.ConfigError(
            f"train.steps_per_call is {config.train.steps_per_call}: {dataset.name} is streamed, a batch a call, so it "
            "must be 1, or 0"
        )
    logger.info(
        "%s: %d training and %d test images of %d classes, %s, %s in %s",
        dataset.name,
        dataset.train_size,
        dataset.test_size,
        len(dataset.class_names),
        "×".join(map(str, dataset.image_shape)),
        "streamed, listed" if streamed else "read",
        duration(time.monotonic() - began),
    )
    for skipped in dataset.skipped:
        logger.warning("left out %s", skipped)
    return dataset


def make_program(
    config: Any,
    dataset: sources.Dataset | streaming.StreamedDataset,
    devices: list[Any],
    start: dict[str, Any] | None,
    seeds: Sequence[int] = (),
) -> Program:
    """The program of a resolved config."""
    if isinstance(dataset, streaming.StreamedDataset):
        return StreamedProgram(config, dataset, devices, pmap, start)
    if len(seeds) > 1:
        together = config.compare.together
        return SeedsProgram(config, dataset, devices, pmap, start, seeds=seeds, together=together)
    return Program(config, dataset, devices, pmap, start)


def load_weights(config: Any) -> dict[str, Any] | None:
    """The variables in the file `model.init_from` of a resolved config; None where it names none.

    Raises:
      WeightsError: the file cannot be read, or does not fit the model.
    """
    file = config.model.init_from
    if not file:
        return None
    arrays, metadata = weights.read_weights(file)
    model = build_model(config)
    stride = getattr(model, "bottleneck_stride", "")
    if getattr(model, "block", "") == "bottleneck":
        recorded = metadata.get("bottleneck_stride", stride)
        if recorded != stride:
            raise weights.WeightsError(
                f"{file} is of bottlenecks with the stride in the {recorded} convolution: "
                f"set model.overrides.bottleneck_stride={recorded}"
            )
        if "bottleneck_stride" not in metadata:
            logger.warning(
                "%s does not say where its bottlenecks have their stride; it is taken to be the %s convolution "
                "(torchvision's ResNets: model.overrides.bottleneck_stride=3x3)",
                file,
                stride,
            )
    try:
        variables = torch_port.from_torch(arrays, model, new_head=config.model.new_head)
    except ValueError as error:
        raise weights.WeightsError(f"{file}: {error}; model.new_head=True leaves the head out") from error
    logger.info("weights from %s%s", file, ", all but the head" if config.model.new_head else "")
    return variables


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
    with processes.together():
        config_lib.check_config(config)
        # Before the first checkpoint there is nothing that another config would spoil.
        stored = _stored(path)
        _refuse_changes(stored, config, path, seeds, resolved=False)
        results = workdir.read_results(path) if stored else None
    here = dict(config_lib.flatten(config)) | {"dataset.data_dir": ""}  # which each machine may have elsewhere
    processes.check_same("config", here)
    processes.check_same("workdir", [str(path.resolve()), stored, results])
    if stored and results and all(stored["train"][name] == config.train[name] for name in ("max_steps", "epochs")):
        logger.info("%s holds a finished run", path)
        report(results, path)
        return results

    config_lib.check_config(config, len(devices))
    with StopSignals() as stop, workdir.RunLog() as log:
        with processes.together():
            dataset = load(config)
            fingerprint = dataset.fingerprint()
        processes.check_same("data set", fingerprint)
        batch, images = config.train.batch_size, dataset.train_size
        if batch > images:
            raise config_lib.ConfigError(
                f"train.batch_size is {batch}: {dataset.name} has {images} training images, so it must be at most "
                f"that, as with --config.train.batch_size={2 ** (images.bit_length() - 1)}"
            )
        streamed = isinstance(dataset, streaming.StreamedDataset)
        if stored and stored.get("streamed", False) != streamed:
            before, now = ("always", "held in memory"), ("never", "streamed")
            before, now = (before, now) if streamed else (now, before)
            raise config_lib.ConfigError(
                f"{path} holds a run whose data set was {before[1]}, and now it would be {now[1]}, in another order: "
                f"set dataset.in_memory={before[0]}, or name another --workdir"
            )
        if streamed and len(seeds) > 1:
            raise config_lib.ConfigError(
                f"{dataset.name} is streamed, and several seeds train together on a data set in memory only: "
                "set dataset.in_memory=always, or compare.seeds to one"
            )
        if stored and stored["dataset_fingerprint"] != fingerprint:
            raise config_lib.ConfigError(
                f"{path} was trained on other images than {dataset.name} has now: restore them, or name another workdir"
            )
        config = config_lib.resolve(config, dataset)
        _refuse_changes(stored, config, path, seeds, resolved=True)
        if stored and (rate := changed_rate(config, stored["train"]["epochs"], images // batch, saved_steps(path)[-1])):
            raise config_lib.ConfigError(
                f"{path} holds a run of train.epochs={stored['train']['epochs']}, now {config.train.epochs}: {rate}; "
                "name another --workdir, or undo the change"
            )
        with processes.together():
            start = load_weights(config)
        stop.check()
        with workdir_lock(path):
            with processes.together():
                if _stored(path) != stored:
                    raise WorkdirError(f"{path} was changed by another run just now: run the same command again")
            record = {
                "class_names": list(dataset.class_names),
                "image_shape": list(dataset.image_shape),
                "streamed": streamed,
                "dataset_fingerprint": fingerprint,
            }
            if len(seeds) > 1:
                record["seeds"] = list(seeds)
            if processes.is_primary():
                # Of a run that is to go on: it would pass for finished if it were stopped now.
                (path / workdir.RESULTS).unlink(missing_ok=True)
                workdir.write_json(path / workdir.CONFIG, workdir.plain(config) | record)
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
                outcomes = run.outcomes(dataset.test_size) if config.eval.every_epochs else None
                if processes.is_primary():
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
                    workdir.write_json(path / workdir.RESULTS, results)
                    report(results, path)
                results = processes.from_primary(results)
            finally:
                checkpoints.close()
    return results


def _refuse_changes(
    stored: dict[str, Any] | None, config: Any, path: pathlib.Path, seeds: tuple[int, ...], *, resolved: bool
) -> None:
    if not stored:
        return
    lines = config_lib.changed_fields(stored, workdir.plain(config), resolved=resolved)
    before = tuple(stored.get("seeds", seeds[:1]))
    if before != seeds:
        lines.append(f"seeds that train together: {before} before, {seeds} now")
    if lines:
        raise config_lib.ConfigError(
            f"{path} holds a run with another config ({'; '.join(lines)}): name another --workdir, or undo the change"
        )


def saved_steps(path: pathlib.Path) -> list[int]:
    """The steps of the workdir's checkpoints, whole or not, oldest first."""
    return sorted(int(entry.name) for entry in (path / CHECKPOINTS).glob("*") if entry.name.isdecimal())


def _stored(path: pathlib.Path) -> dict[str, Any] | None:
    """What config.json says of the run that is to be gone on with; None where nothing was saved yet."""
    if not saved_steps(path):
        return None
    if stored := workdir.read_config(path):
        return stored
    raise WorkdirError(f"{path} has checkpoints and no {workdir.CONFIG}: restore it, or name another --workdir")


def _check_has_checkpoints(path: pathlib.Path) -> None:
    if not saved_steps(path) or not (path / workdir.CONFIG).is_file():
        raise WorkdirError(f"there is no checkpoint in {path}: train first, or name the run with --workdir")


def _read_checkpoint(config: Any, path: pathlib.Path, like: Any) -> tuple[int, Any]:
    """The step and the state of the checkpoint `eval.checkpoint`; of several seeds, that of the config's."""
    seeds = workdir.read_json(path / workdir.CONFIG).get("seeds", [])
    if seeds:
        if config.seed not in seeds:
            raise config_lib.ConfigError(f"seed is {config.seed}: {path} has the seeds {', '.join(map(str, seeds))}")
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
    _check_has_checkpoints(path)
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
    with processes.together():
        config_lib.check_config(config)
        if not config.model.init_from:
            _check_has_checkpoints(path)
        dataset = load(config)
    processes.check_same("data set", dataset.fingerprint())
    if not config.model.init_from:
        trained = tuple((workdir.read_config(path) or {})["class_names"])
        if trained != dataset.class_names:
            raise config_lib.ConfigError(
                f"{dataset.name} has the classes {', '.join(dataset.class_names)}, but {path} was trained on "
                f"{', '.join(trained)}: evaluate it on images of these"
            )
    config = config_lib.resolve(config, dataset)
    program = make_program(config, dataset, devices, load_weights(config))
    if config.model.init_from:
        step, state = 0, program.initial_state()
    else:
        step, state = _read_checkpoint(config, path, program.like)
    outcomes = np.empty((dataset.test_size, 2), np.int32)
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
    if processes.is_primary():
        figures = path / workdir.FIGURES / "eval"
        title = f"{config.model.name} on {dataset.name}, {config.model.init_from or f'step {step}'}"
        try:
            by_class = write_figures(figures, dataset, outcomes, title, config.seed)
            workdir.write_json(path / workdir.EVAL, metrics | {"per_class": by_class})
        except OSError as error:  # as in a workdir that another user owns, or on a full disk
            logger.warning("%s and the pictures cannot be written: %s", path / workdir.EVAL, error.strerror)
        else:
            logger.info("by class: %s, pictures: %s", path / workdir.EVAL, figures)
    return metrics
