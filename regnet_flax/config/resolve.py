"""Completes a config from its data set, and finds the changes that forbid resuming a run."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

from regnet_flax.config.check import flatten
from regnet_flax.config.fields import FIELDS
from regnet_flax.data import stream
from regnet_flax.data.sources import Dataset
from regnet_flax.errors import ConfigError
from regnet_flax.models.registry import OPTIONS

logger = logging.getLogger("regnet_flax")

# Fields of a run's config.json that other modes ignore: they do not describe the result, or a stranger's file must not
# set them.
_NOT_TAKEN = ("model.init_from", "model.new_head", "model.adapt_stem", "export.path")


def resolve(config: Any, dataset: Dataset | stream.StreamedDataset) -> Any:
    """Returns a copy of the config, with the fields that it left to the data set filled in.

    Raises:
      ConfigError: a value contradicts the data set.
    """
    config = copy.deepcopy(config)
    height, width, channels = dataset.image_shape
    if height == width:
        config.dataset.image_size = height
    config.dataset.num_classes = len(dataset.class_names)
    if not config.dataset.mean:
        if not dataset.size("train"):
            raise ConfigError(
                f"dataset.mean is (): {dataset.name} has no training images to take it from; set it, and dataset.std"
            )
        mean, std = dataset.statistics()
        # A channel that is the same everywhere has nothing to divide.
        config.dataset.mean, config.dataset.std = mean, tuple(value or 1.0 for value in std)
    if len(config.dataset.mean) not in (1, channels):
        raise ConfigError(
            f"dataset.mean has {len(config.dataset.mean)} values: the images of {dataset.name} have {channels} channels"
        )
    return config


def fill_in(config: Any, stored: Mapping[str, Any]) -> None:
    """Gives a config the values of a run's config.json, which may be of an earlier version.

    Fields that no longer exist are ignored, with a warning if they were set. "model.init_from" with its options and
    "export.path" are ignored too: the workdir may come from a stranger.

    Args:
      config: a nested config with every field; changed in place.
      stored: the contents of config.json.

    Raises:
      ConfigError: a section holds a plain value, or a config cannot hold a value's type.
    """
    values = dict(flatten(stored))
    if wrong := [name for name in config if hasattr(config[name], "items") and name in values]:
        raise ConfigError(f"{wrong[0]} is {values[wrong[0]]!r}")
    _warn_of_unknown(values)
    kept = {name: values.get(name, field.default) for name, field in FIELDS.items() if name not in _NOT_TAKEN}
    with config.ignore_type():
        config.update_from_flattened_dict(
            kept | {"model.init_from": "", "model.new_head": False, "model.adapt_stem": False}
        )


def _warn_of_unknown(stored: Mapping[str, Any]) -> None:
    """Warns of unknown fields that were set; facts that a run records beside its fields are in no section."""
    for name, value in stored.items():
        if "." in name and name not in FIELDS and value is not None:
            logger.warning("config.json has %s=%r, which this version does not know: it is ignored", name, value)


def changed_fields(before: Mapping[str, Any], now: Mapping[str, Any], *, resolved: bool) -> list[str]:
    """Lists the changes that forbid resuming a run under another config.

    Args:
      before: the run's resolved config, from this version or an earlier one: a field that it lacks had its default.
      now: the config to resume with.
      resolved: whether `now` is resolved too; if not, fields that it leaves to the data set are not compared.

    Returns:
      One line per field that differs but must not, such as "train.batch_size: 128 before, 64 now".
    """
    old, new = dict(flatten(before)), dict(flatten(now))
    if not resolved:  # a run is compared twice: warn once
        _warn_of_unknown(old)
    lines = []
    for name, field in FIELDS.items():
        was, value = old.get(name, field.default), new[name]
        left_to_data = field.from_data and not resolved and value == field.default
        if not (field.may_change or left_to_data or was == value):
            lines.append(_changed(name, was, value))
    return lines


def changed_rounding(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lists, like changed_fields, the changes that only affect how a run rounds."""
    old, new = dict(flatten(before)), dict(flatten(now))
    names = [f"model.overrides.{name}" for name, option in OPTIONS.items() if option.rounding]
    return [_changed(name, old.get(name), new[name]) for name in names if old.get(name) != new[name]]


def _changed(name: str, before: Any, now: Any) -> str:
    return f"{name}: {before!r} before, {now!r} now"
