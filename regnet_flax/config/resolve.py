"""Completes a config from its data set, and says what forbids resuming a run under another one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from regnet_flax.config.check import flatten
from regnet_flax.config.fields import AUTOMATIC, MAY_CHANGE, MAY_CHANGE_LATER_RATES
from regnet_flax.data import stream
from regnet_flax.data.sources import Dataset
from regnet_flax.errors import ConfigError


def resolve(config: Any, dataset: Dataset | stream.StreamedDataset) -> Any:
    """A copy of the config with what it left to the data set filled in.

    Raises:
      ConfigError: a value contradicts the data set.
    """
    config = copy.deepcopy(config)
    height, width, channels = dataset.image_shape
    if height == width:
        config.dataset.image_size = height
    config.dataset.num_classes = len(dataset.class_names)
    if not config.dataset.mean:
        mean, std = dataset.statistics()
        # A channel that is the same everywhere has nothing to divide.
        config.dataset.mean, config.dataset.std = mean, tuple(value or 1.0 for value in std)
    if len(config.dataset.mean) not in (1, channels):
        raise ConfigError(
            f"dataset.mean has {len(config.dataset.mean)} values: the images of {dataset.name} have {channels} channels"
        )
    return config


def changed_fields(before: Mapping[str, Any], now: Mapping[str, Any], *, resolved: bool) -> list[str]:
    """What forbids going on with a run under another config.

    Args:
      before: the run's resolved config.
      now: the config to go on with.
      resolved: whether `now` is resolved too; if not, what it leaves to the data set is not compared.

    Returns:
      A line for each field that differs and may not, "train.batch_size: 128 before, 64 now".
    """
    old, new = dict(flatten(before)), dict(flatten(now))
    lines = []
    for field in new:
        automatic = not resolved and field in AUTOMATIC and new[field] == AUTOMATIC[field]
        if field in MAY_CHANGE + MAY_CHANGE_LATER_RATES or automatic or old.get(field) == new[field]:
            continue
        lines.append(f"{field}: {old.get(field)!r} before, {new[field]!r} now")
    return lines
