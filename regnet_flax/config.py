"""Checks a config's values, all at once, before anything is compiled, downloaded or written; completes it."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from regnet_flax.data import streaming
from regnet_flax.data.augment import AUGMENTATIONS
from regnet_flax.data.sources import IMAGES, SOURCES, Dataset
from regnet_flax.models.registry import OPTIONS, create_model, parse_variant
from regnet_flax.training.optimizer import SCHEDULES, boundary_steps

Check = Callable[[Any], str]  # "" for a good value, otherwise what the value must be


class ConfigError(ValueError):
    """One line for each field whose value is wrong: the field, the value and the mend."""


def _number(low: float, high: float = math.inf, *, above: bool = False) -> Check:
    def check(value: Any) -> str:
        # A whole number may be too large for math.isfinite.
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        if number and (low < value if above else low <= value) and value <= high:
            return ""
        bound = f" and at most {high:g}" if math.isfinite(high) else ""
        return f"a number {'above' if above else 'of at least'} {low:g}{bound}"

    return check


def _whole(low: int, high: int = 2**31 - 1) -> Check:
    def check(value: Any) -> str:
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return ""
        too_high = isinstance(value, int) and value > high
        return f"a whole number of at least {low}" + (f" and at most {high}" if high < 2**31 - 1 or too_high else "")

    return check


def _choice(*choices: str) -> Check:
    return lambda value: "" if isinstance(value, str) and value in choices else f"one of {', '.join(choices)}"


def _text(value: Any) -> str:
    return "" if isinstance(value, str) else "text"


def _flag(value: Any) -> str:
    return "" if isinstance(value, bool) else "True or False"


def _each(check: Check) -> Check:
    def check_all(value: Any) -> str:
        if not isinstance(value, (tuple, list)):
            return "a tuple, such as '(1, 2)'"
        wrong = next((problem for problem in map(check, value) if problem), "")
        return f"a tuple, each {wrong}" if wrong else ""

    return check_all


def _optional(check: Check) -> Check:
    return lambda value: "" if value is None else check(value)


def _checkpoint(value: Any) -> str:
    known = isinstance(value, str) and (value in ("best", "last") or value.isdecimal())
    return "" if known or not _whole(0)(value) else "best, last or a step"


def _any(value: Any) -> str:
    return ""


FIELDS: dict[str, Check] = {
    "seed": _whole(0),
    "dtype": _choice("float32", "bfloat16"),
    "model.name": _text,
    "model.init_from": _text,
    "model.new_head": _flag,
    # The other values are create_model's to check.
    **{f"model.overrides.{option}": _any for option in OPTIONS},
    "model.overrides.share_regulator": _optional(_flag),
    "model.overrides.regulated_stages": _optional(_each(_whole(1))),
    "model.overrides.remat": _optional(_flag),
    "model.overrides.tuned": _optional(_flag),
    "dataset.name": _choice(*dict.fromkeys((*SOURCES, *streaming.STREAMED))),
    "dataset.data_dir": _text,
    "dataset.num_classes": _whole(0),
    "dataset.in_memory": _choice("auto", "always", "never"),
    "dataset.workers": _whole(0, 1024),
    "dataset.prefetch": _whole(1, 1024),
    "dataset.strict": _flag,
    "dataset.image_size": _whole(0, 8192),
    "dataset.augment": _each(_choice(streaming.CROP, *AUGMENTATIONS)),
    "dataset.mean": _each(_number(-10, 10)),
    "dataset.std": _each(_number(0, 10, above=True)),
    "train.batch_size": _whole(1),
    "train.epochs": _whole(1),
    "train.max_steps": _whole(0),
    "train.steps_per_call": _whole(0),
    "train.batch_norm": _choice("sync", "local"),
    "train.mixup": _number(0, 1000),
    "train.cutmix": _number(0, 1000),
    "optimizer.learning_rate": _number(0, 1e6, above=True),
    "optimizer.momentum": _number(0, 1),
    "optimizer.nesterov": _flag,
    "optimizer.weight_decay": _number(0, 1e6),
    "optimizer.schedule": _choice(*SCHEDULES),
    "optimizer.boundaries": _each(_number(0, 1e9, above=True)),
    "optimizer.decay": _number(0, 1, above=True),
    "optimizer.warmup_epochs": _number(0),
    "optimizer.label_smoothing": _number(0, 1),
    "optimizer.clip_norm": _number(0),
    "optimizer.accumulate_steps": _whole(1),
    "optimizer.ema_decay": _number(0, 0.99999),
    "eval.batch_size": _whole(1),
    "eval.every_epochs": _whole(0),
    "eval.checkpoint": _checkpoint,
    "log.every_steps": _whole(0),
    "checkpoint.every_steps": _whole(0),
    "checkpoint.keep": _whole(1),
    "checkpoint.keep_best": _whole(0),
    "predict.images": _text,
    "predict.top": _whole(1),
    "predict.json": _flag,
    "compare.models": _each(_text),
    "compare.seeds": _each(_whole(0)),
    "compare.together": _choice("auto", "always", "never"),
    "export.format": _choice("stablehlo", "safetensors", "torch"),
    "export.path": _text,
}

# The fields in which a run may be resumed with another value: they change no number that training computes.
MAY_CHANGE = (
    "dataset.data_dir",
    "dataset.in_memory",
    "dataset.workers",
    "dataset.prefetch",
    "train.max_steps",
    "train.steps_per_call",
    "eval.batch_size",
    "eval.every_epochs",
    "eval.checkpoint",
    "log.every_steps",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "checkpoint.keep_best",
    "predict.images",
    "predict.top",
    "predict.json",
    "compare.models",
    "compare.seeds",
    "export.format",
    "export.path",
)
# And those in which it may where no learning rate already used changes by it (program.changed_rate): boundaries that
# are fractions of the run, and the cosine, depend on them.
MAY_CHANGE_LATER_RATES = ("train.epochs",)
# The values that stand for "from the data set".
AUTOMATIC = {"dataset.num_classes": 0, "dataset.image_size": 0, "dataset.mean": (), "dataset.std": ()}


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("train.batch_size", 128) and so on, for every field of a nested config; sequences become tuples."""
    for name in config:
        value = config[name]
        if hasattr(value, "items"):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", tuple(value) if isinstance(value, list) else value


def model_options(config: Any) -> dict[str, Any]:
    """`model.overrides` as create_model's options."""
    return {name: getattr(config.model.overrides, name) for name in OPTIONS}


def image_shape(config: Any) -> tuple[tuple[int, int, int], int]:
    """Height, width and channels of the images that a config trains on, and the number of classes, with none read."""
    shape, classes = IMAGES.get(config.dataset.name, ((32, 32, 3), 10))
    size = config.dataset.image_size
    return (size, size, shape[-1]) if size else shape, config.dataset.num_classes or classes


def check_config(config: Any, devices: int = 1) -> None:
    """Raises ConfigError if any value is wrong in itself, or contradicts another.

    Args:
      config: a nested config with the fields of configs/base.py.
      devices: over which a batch is divided.
    """
    values = dict(flatten(config))
    problems = [f"{field} is missing: start from configs/base.py" for field in FIELDS if field not in values]
    problems += [f"{field} is not a field of configs/base.py: remove it" for field in values if field not in FIELDS]
    sound = {}
    for field, check in FIELDS.items():
        if field not in values:
            continue
        if wrong := check(values[field]):
            problems.append(f"{field} is {values[field]!r}: it must be {wrong}")
        else:
            sound[field] = values[field]
    problems += _contradictions(sound, devices)
    if problems:
        raise ConfigError("\n".join(problems))


def _contradictions(values: dict[str, Any], devices: int) -> Iterator[str]:
    """What is wrong between fields that are right in themselves; `values` has no others."""
    overrides = {option: f"model.overrides.{option}" for option in OPTIONS}
    if values.keys() >= {"model.name", *overrides.values()}:
        options = {option: values[field] for option, field in overrides.items()}
        try:
            create_model(values["model.name"], num_classes=10, **options)
        except (ValueError, TypeError) as error:
            yield f"model: {error}"
        yield from _wrong_variants(values.get("compare.models", ()), options)
    if (seeds := values.get("compare.seeds", ())) and len(set(seeds)) < len(seeds):
        yield f"compare.seeds is {seeds}: name each seed once"
    accumulate_steps = values.get("optimizer.accumulate_steps", 1)
    pairs = 2 if values.get("train.mixup") or values.get("train.cutmix") else 1
    parts = devices * accumulate_steps * pairs
    if (batch := values.get("train.batch_size", 0)) % parts:
        nearest = max(parts, batch - batch % parts)
        factors = [f"the {devices} devices"]
        factors += [f"optimizer.accumulate_steps={accumulate_steps}"] if accumulate_steps > 1 else []
        factors += ["the 2 images of a pair to mix"] if pairs > 1 else []
        yield f"train.batch_size is {batch}: it must be a multiple of {' times '.join(factors)}, such as {nearest}"
    mean, std = values.get("dataset.mean"), values.get("dataset.std")
    if mean is not None and std is not None and len(mean) != len(std):
        yield (
            f"dataset.mean has {len(mean)} values and dataset.std {len(std)}: "
            "give both one value a channel, or both () to take them from the data"
        )
    epochs, boundaries = values.get("train.epochs"), values.get("optimizer.boundaries", ())
    if epochs is not None:
        steps = boundary_steps(boundaries, epochs, 1000)
        if steps != sorted(set(steps)):
            yield f"optimizer.boundaries is {boundaries}: put them in order, each once"
        if values.get("optimizer.schedule") == "step" and max(steps, default=0) > epochs * 1000:
            yield f"optimizer.boundaries is {boundaries}: the run ends at train.epochs={epochs}"
        if (warmup := values.get("optimizer.warmup_epochs", 0)) > epochs:
            yield f"optimizer.warmup_epochs is {warmup}: the run ends at train.epochs={epochs}"
    if values.get("optimizer.nesterov") and values.get("optimizer.momentum") == 0:
        yield "optimizer.nesterov is True: it needs optimizer.momentum above 0"
    if values.get("model.new_head") and values.get("model.init_from") == "":
        yield "model.new_head is True: it needs model.init_from, a file of weights"
    if values.get("dataset.name") == "folder" and values.get("dataset.data_dir") == "":
        yield "dataset.data_dir is '': name the directory of train/ and test/, with --config.dataset.data_dir=DIR"
    yield from _streaming_contradictions(values)


def _streaming_contradictions(values: dict[str, Any]) -> Iterator[str]:
    name, in_memory = values.get("dataset.name", "folder"), values.get("dataset.in_memory", "auto")
    augment = values.get("dataset.augment", ())
    if name not in streaming.STREAMED:
        if in_memory == "never":
            yield f"dataset.in_memory is 'never': only {' and '.join(streaming.STREAMED)} can be streamed, not {name}"
        if streaming.CROP in augment:
            yield (
                f"dataset.augment has {streaming.CROP}, which is for photographs of any size "
                f"({' and '.join(streaming.STREAMED)}): {name} takes 'crop'"
            )
        return
    if in_memory == "always" and name == "imagenet2012":
        yield "dataset.in_memory is 'always': imagenet2012 does not fit in memory, set it to auto"
    if streaming.CROP in augment:
        if in_memory == "always":
            yield f"dataset.in_memory is 'always': {streaming.CROP} is done while decoding, set it to auto or never"
        if streaming.CROP in augment[1:]:
            yield f"dataset.augment is {augment}: {streaming.CROP} must be the first, and there once"
    streamed = streaming.CROP in augment or in_memory == "never"
    if streamed and name == "folder" and values.get("dataset.image_size") == 0:
        yield "dataset.image_size is 0: streamed images are brought to one size, such as 224"


def _wrong_variants(variants: Sequence[str], overrides: dict[str, Any]) -> Iterator[str]:
    """What is wrong with compare.models, whose own options go before `model.overrides`."""
    seen: dict[str, str] = {}
    for text in variants:
        try:
            name, options = parse_variant(text)
            for option, value in options.items():
                if wrong := FIELDS.get(f"model.overrides.{option}", _any)(value):
                    raise ValueError(f"{option} is {value!r}: it must be {wrong}")
            create_model(name, num_classes=10, **overrides | options)
        except (ValueError, TypeError) as error:
            yield f"compare.models, {text!r}: {error}"
            continue
        if (same := seen.setdefault(repr((name, sorted(options.items()))), text)) is not text:
            yield f"compare.models has {same!r} and {text!r}: name each model once"


def resolve(config: Any, dataset: Dataset | streaming.StreamedDataset) -> Any:
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
