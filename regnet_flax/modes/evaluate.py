"""--mode eval: evaluates a checkpoint of a workdir, or a file of weights, on the test split."""

from __future__ import annotations

import logging
import pathlib
from typing import Any

import jax
import numpy as np

from regnet_flax.analysis.by_class import write_figures
from regnet_flax.command_line import Options
from regnet_flax.config.check import check_config, eval_batch_size
from regnet_flax.config.resolve import resolve
from regnet_flax.errors import ConfigError
from regnet_flax.files import dataset_title, write_json
from regnet_flax.modes.setup.datasets import Dataset, open_trained_dataset
from regnet_flax.modes.setup.models import load_weights, read_trained
from regnet_flax.modes.setup.trainers import make_trainer
from regnet_flax.port.weights import read_weights
from regnet_flax.trained import take_description
from regnet_flax.training import parallel, workdir

logger = logging.getLogger("regnet_flax")


def evaluate_only(config: Any, path: str | pathlib.Path, devices: list[Any] | None = None) -> dict[str, float]:
    """Evaluates the checkpoint `eval.checkpoint` of a workdir, or the file `model.init_from`, on the test split.

    It writes eval.json and figures/eval/ into the workdir; the files of training stay as they are.

    Args:
      config: the workdir's config, in which any value may be overridden.
      path: the workdir.
      devices: the devices to evaluate on; by default all, including those of other processes.

    Returns:
      "step", "loss", "accuracy", "top5_accuracy" if there are more than five classes, and "count".

    Raises:
      ConfigError, DataError, CheckpointError: see train_and_evaluate.
      WeightsError: the file cannot be used.
    """
    path, devices = pathlib.Path(path), devices or jax.devices()
    with parallel.together():
        check_config(config)
        file, record, found = config.model.init_from, {}, None
        if file:
            if config.model.new_head:
                raise ConfigError(f"model.new_head is True: without the head of {file} there is nothing to evaluate")
            found = read_weights(file)
            known = take_description(config, found[1]) or {}
            check_config(config)
        else:
            workdir.check_has_checkpoints(path)
            known = record = workdir.read_config(path) or {}
        dataset = open_trained_dataset(config, record, known.get("class_names", ()), file or path)
        channels = dataset.image_shape[-1]
        if config.model.adapt_stem and known.get("image_shape", (channels,))[-1] != channels:
            config.dataset.mean = config.dataset.std = ()  # those of other channels
    parallel.check_same("data set", dataset.fingerprint())
    with parallel.together():
        config = resolve(config, dataset)
        start = load_weights(config, channels, found)
    trainer = make_trainer(config, dataset, devices, start=start)
    if config.model.init_from:
        step, variables = 0, trainer.initial_state().variables
    else:
        step, variables = read_trained(config, path, trainer.like.variables)
    size = dataset.size("test")
    outcomes = np.empty((size, 3), np.int32)
    try:
        found = trainer.evaluate(variables, "test", size, eval_batch_size(config), outcomes=outcomes)
    finally:
        trainer.close()
    metrics: dict[str, Any] = {"step": step} | found
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
        title = f"{config.model.name} on {dataset_title(config.dataset)}, {config.model.init_from or f'step {step}'}"
        _write(path, dataset, outcomes, metrics, title, config.seed)
    return metrics


def _write(
    path: pathlib.Path, dataset: Dataset, outcomes: np.ndarray, metrics: dict[str, Any], title: str, seed: int
) -> None:
    figures = path / workdir.FIGURES / "eval"
    try:
        by_class = write_figures(figures, dataset, outcomes, title, seed)
        write_json(path / workdir.EVAL, metrics | {"per_class": by_class})
    except OSError as error:  # such as in another user's workdir, or on a full disk
        logger.warning("%s and the pictures cannot be written: %s", path / workdir.EVAL, error.strerror)
    else:
        logger.info("by class: %s, pictures: %s", path / workdir.EVAL, figures)


def run(config: Any, options: Options) -> None:
    """Evaluates the checkpoint `eval.checkpoint` of the workdir, or `model.init_from`; see `evaluate_only`."""
    evaluate_only(config, options.workdir)
