"""Training and evaluation from a config and a workdir: where everything else is put together."""

from __future__ import annotations

import logging
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from regnet_flax import config as config_lib
from regnet_flax import torch_port, weights
from regnet_flax.analysis import plots
from regnet_flax.data import sources
from regnet_flax.training import workdir
from regnet_flax.training.checkpoint import CHECKPOINTS, Checkpoints
from regnet_flax.training.figures import write_figures
from regnet_flax.training.interrupt import StopSignals, WorkdirError, workdir_lock
from regnet_flax.training.program import AXIS, Program, build_model, build_optimizer, build_state
from regnet_flax.training.progress import duration
from regnet_flax.training.run import Run, collect_results, report

logger = logging.getLogger("regnet_flax")


def pmap(function: Callable[..., Any], mapped: Sequence[int | None], devices: list[Any], donate: bool = False):
    """Runs `function` on every device's part; what it returns is the same on all of them.

    The state has no device axis, so checkpoints hold for any number of devices. That the result is the same everywhere
    is not checked: a forgotten mean over devices would pass in silence.
    """
    return jax.pmap(
        function,
        axis_name=AXIS,
        in_axes=tuple(mapped),
        out_axes=None,
        devices=devices,
        donate_argnums=(0,) if donate else (),
    )


def load(config: Any) -> sources.Dataset:
    """The config's data set; says which images could not be read."""
    began = time.monotonic()
    settings = config.dataset
    dataset = sources.load_dataset(
        settings.name,
        data_dir=settings.data_dir,
        image_size=settings.image_size,
        num_classes=settings.num_classes,
        strict=settings.strict,
        seed=config.seed,
    )
    logger.info(
        "%s: %d training and %d test images of %d classes, %s, read in %s",
        dataset.name,
        len(dataset.train.labels),
        len(dataset.test.labels),
        len(dataset.class_names),
        "×".join(map(str, dataset.train.images.shape[1:])),
        duration(time.monotonic() - began),
    )
    for skipped in dataset.skipped:
        logger.warning("left out %s", skipped)
    return dataset


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


def train_and_evaluate(config: Any, path: str | pathlib.Path, devices: list[Any] | None = None) -> dict[str, Any]:
    """Trains, or goes on with, the run of a workdir.

    Args:
      config: a nested config with the fields of configs/base.py.
      path: the workdir. A run that it holds is gone on with; a finished one is only reported.
      devices: to train on; all local ones by default.

    Returns:
      What results.json holds.

    Raises:
      ConfigError: wrong values, or others than those the workdir's run began with.
      DataError: the data set is missing or unreadable.
      WorkdirError: the workdir cannot be used.
      CheckpointError: the workdir has checkpoints, and none can be read.
      NonFiniteError: the loss or a gradient is not finite.
      Interrupted: stopped by a signal, after saving.
    """
    path, devices = pathlib.Path(path), devices or jax.local_devices()
    config_lib.check_config(config)
    # Before the first checkpoint there is nothing that another config would spoil.
    stored = workdir.read_json(path / workdir.CONFIG) if has_checkpoints(path) else None
    _refuse_changes(stored, config, path, resolved=False)
    results = workdir.read_json(path / workdir.RESULTS)
    if stored and results and stored["train"]["max_steps"] == config.train.max_steps:
        logger.info("%s holds a finished run", path)
        report(results, path)
        return results

    config_lib.check_config(config, len(devices))
    with StopSignals() as stop, workdir.RunLog() as log:
        dataset = load(config)
        batch, images = config.train.batch_size, len(dataset.train.labels)
        if batch > images:
            raise config_lib.ConfigError(
                f"train.batch_size is {batch}: {dataset.name} has {images} training images, so it must be at most "
                f"that, as with --config.train.batch_size={2 ** (images.bit_length() - 1)}"
            )
        fingerprint = dataset.fingerprint()
        if stored and stored["dataset_fingerprint"] != fingerprint:
            raise config_lib.ConfigError(
                f"{path} was trained on other images than {dataset.name} has now: restore them, or name another workdir"
            )
        config = config_lib.resolve(config, dataset)
        _refuse_changes(stored, config, path, resolved=True)
        start = load_weights(config)
        with workdir_lock(path):
            # Of a run that is to go on: it would pass for finished if it were stopped now.
            (path / workdir.RESULTS).unlink(missing_ok=True)
            record = {
                "class_names": list(dataset.class_names),
                "image_shape": list(dataset.train.images.shape[1:]),
                "dataset_fingerprint": fingerprint,
            }
            workdir.write_json(path / workdir.CONFIG, workdir.plain(config) | record)
            log.write_to(path)
            checkpoints = Checkpoints(path, config.checkpoint.keep, config.checkpoint.keep_best)
            try:
                logger.info(
                    "%s on %d × %s, %s; the first step takes longer, since it is compiled",
                    config.model.name,
                    len(devices),
                    devices[0].device_kind,
                    config.dtype,
                )
                program = Program(config, dataset, devices, pmap, start)
                run = Run(config, path, program, checkpoints, stop)
                run.run()
                checkpoints.wait()
                results = collect_results(run, config, path)
                figures, title = path / workdir.FIGURES, f"{config.model.name} on {dataset.name}"
                figures.mkdir(exist_ok=True)
                if config.eval.every_epochs:
                    outcomes = run.outcomes(len(dataset.test.labels))
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
            finally:
                checkpoints.close()
    return results


def _refuse_changes(stored: dict[str, Any] | None, config: Any, path: pathlib.Path, *, resolved: bool) -> None:
    if stored and (lines := config_lib.changed_fields(stored, workdir.plain(config), resolved=resolved)):
        raise config_lib.ConfigError(
            f"{path} holds a run with another config ({'; '.join(lines)}): name another --workdir, or undo the change"
        )


def has_checkpoints(path: pathlib.Path) -> bool:
    """Whether the workdir has any, whole or not."""
    return any(entry.name.isdigit() for entry in (path / CHECKPOINTS).glob("*"))


def _check_has_checkpoints(path: pathlib.Path) -> None:
    if not has_checkpoints(path) or not (path / workdir.CONFIG).is_file():
        raise WorkdirError(f"there is no checkpoint in {path}: train first, or name the run with --workdir")


def _read_checkpoint(config: Any, path: pathlib.Path, like: Any) -> tuple[int, Any]:
    checkpoints = Checkpoints(path, config.checkpoint.keep, config.checkpoint.keep_best)
    try:
        return checkpoints.read(str(config.eval.checkpoint), like)
    finally:
        checkpoints.close()


def load_trained(config: Any, path: str | pathlib.Path) -> tuple[Any, dict[str, Any], int]:
    """The model of a workdir, and the variables of its checkpoint `eval.checkpoint`; no data set is read.

    Args:
      config: the workdir's.
      path: the workdir.

    Returns:
      The model, its "params" and "batch_stats", and the step.

    Raises:
      ConfigError, WorkdirError, CheckpointError: see train_and_evaluate.
    """
    path = pathlib.Path(path)
    config_lib.check_config(config)
    _check_has_checkpoints(path)
    image_shape = workdir.read_json(path / workdir.CONFIG)["image_shape"]
    model, (_, tx) = build_model(config), build_optimizer(config, 1)
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        jax.eval_shape(lambda: build_state(model, tx, image_shape, config.seed)),
    )
    step, state = _read_checkpoint(config, path, like)
    return model, {"params": state.params, "batch_stats": state.batch_stats}, step


def evaluate_only(config: Any, path: str | pathlib.Path, devices: list[Any] | None = None) -> dict[str, float]:
    """Evaluates the checkpoint `eval.checkpoint` of a workdir, or the file `model.init_from`, on the test split.

    Leaves eval.json and figures/eval/ in the workdir; those of training stay as they are.

    Args:
      config: the workdir's, its values to be overridden at will.
      path: the workdir.
      devices: to evaluate on; all local ones by default.

    Returns:
      "step", "loss", "accuracy", "top5_accuracy" where there are more than five classes, and "count".

    Raises:
      ConfigError, DataError, CheckpointError: see train_and_evaluate.
    """
    path, devices = pathlib.Path(path), devices or jax.local_devices()
    config_lib.check_config(config)
    if not config.model.init_from:
        _check_has_checkpoints(path)
    dataset = load(config)
    if not config.model.init_from:
        trained = tuple(workdir.read_json(path / workdir.CONFIG)["class_names"])
        if trained != dataset.class_names:
            raise config_lib.ConfigError(
                f"{dataset.name} has the classes {', '.join(dataset.class_names)}, but {path} was trained on "
                f"{', '.join(trained)}: evaluate it on images of these"
            )
    config = config_lib.resolve(config, dataset)
    program = Program(config, dataset, devices, pmap, load_weights(config))
    if config.model.init_from:
        step, state = 0, program.initial_state()
    else:
        step, state = _read_checkpoint(config, path, program.like)
    outcomes = np.empty((len(dataset.test.labels), 2), np.int32)
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
    figures = path / workdir.FIGURES / "eval"
    title = f"{config.model.name} on {dataset.name}, {config.model.init_from or f'step {step}'}"
    by_class = write_figures(figures, dataset, outcomes, title, config.seed)
    workdir.write_json(path / workdir.EVAL, metrics | {"per_class": by_class})
    logger.info("by class: %s, pictures: %s", path / workdir.EVAL, figures)
    return metrics
