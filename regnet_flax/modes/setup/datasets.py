"""Opens the data set of a config, to train on or to measure a trained model on."""

from __future__ import annotations

import logging
import time
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from regnet_flax.data import sources, stream
from regnet_flax.errors import ConfigError
from regnet_flax.files import duration
from regnet_flax.places import fetch_data

Dataset = sources.Dataset | stream.StreamedDataset

logger = logging.getLogger("regnet_flax")


def open_dataset(config: Any, seed: int | None = None, class_names: Sequence[str] = ()) -> Dataset:
    """Opens the config's data set, in memory or streamed; logs its sizes, and the images that could not be read.

    Args:
      config: a nested config with the fields of configs/base.py.
      seed: determines the held-out images and synthetic images; by default the config's seed. Seeds that train
        together share the first one's.
      class_names: the classes of a model to evaluate on an image folder, which then needs no training images.
    """
    began = time.monotonic()
    settings = config.dataset
    options = {name: settings[name] for name in ("data_dir", "image_size", "num_classes", "strict", "validation")}
    options["data_dir"] = fetch_data(settings.data_dir, "" if settings.name == "folder" else settings.name)
    options["seed"] = config.seed if seed is None else seed
    options["class_names"] = tuple(class_names)
    dataset = stream.open_stream(settings.name, in_memory=settings.in_memory, augment=settings.augment, **options)
    streamed = dataset is not None
    if dataset is None:
        dataset = sources.load_dataset(settings.name, **options)
    if streamed and config.train.steps_per_call > 1:
        raise ConfigError(
            f"train.steps_per_call is {config.train.steps_per_call}: {dataset.name} is streamed, one batch per "
            "call, so it must be 1, or 0"
        )
    for number, note in enumerate(dataset.notes):
        logger.log(logging.WARNING if number else logging.INFO, "%s", note)
    counted = f"{dataset.size('train')} training"
    if dataset.validation is not None:
        counted += f", {dataset.size('validation')} validation"
    logger.info(
        "%s: %s and %d test images of %d classes, %s, %s in %s",
        dataset.name,
        counted,
        dataset.size("test"),
        len(dataset.class_names),
        "×".join(map(str, dataset.image_shape)),
        "streamed, listed" if streamed else "read",
        duration(time.monotonic() - began),
    )
    for skipped in dataset.skipped:
        logger.warning("left out %s", skipped)
    return dataset


def open_trained_dataset(config: Any, record: Mapping[str, Any], class_names: Sequence[str], source: Any) -> Dataset:
    """Opens the data set to measure a trained model on, with the images that its run held out.

    Args:
      config: see open_dataset.
      record: the run's config.json; empty for a file of weights.
      class_names: the model's classes; () if they are unknown.
      source: the workdir or file, for messages.

    Raises:
      ConfigError: the data set has other classes.
      DataError: it cannot be read.
    """
    seeds = record.get("seeds", [record.get("seed", config.seed)])
    # Some systems store é as two characters.
    names = tuple(unicodedata.normalize("NFC", name) for name in class_names)
    dataset = open_dataset(config, seeds[0], names)
    if names and names != dataset.class_names:
        raise ConfigError(
            f"{dataset.name} has the classes {', '.join(dataset.class_names)}, but {source} was trained on "
            f"{', '.join(names)}: use images of these"
        )
    return dataset
