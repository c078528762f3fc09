"""Checks a config's values, all at once, before anything is compiled, downloaded or written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from regnet_flax.config.fields import FIELDS, OPTIMIZERS, boundary_steps
from regnet_flax.data import stream
from regnet_flax.data.augment import ERASE
from regnet_flax.data.sources import IMAGES
from regnet_flax.errors import ConfigError
from regnet_flax.models.plugins import import_plugins
from regnet_flax.models.registry import OPTIONS, check_model, parse_variant


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields ("train.batch_size", 128) and so on for every field of a nested config; lists become tuples."""
    for name in config:
        value = config[name]
        if hasattr(value, "items"):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", tuple(value) if isinstance(value, list) else value


def model_options(config: Any) -> dict[str, Any]:
    """Returns `model.overrides` as options of create_model."""
    return {name: getattr(config.model.overrides, name) for name in OPTIONS}


def image_shape(config: Any) -> tuple[tuple[int, int, int], int]:
    """Returns (height, width, channels) of a config's training images and the class count, without reading an image."""
    shape, classes = IMAGES.get(config.dataset.name, ((32, 32, 3), 10))
    size = config.dataset.image_size
    return (size, size, shape[-1]) if size else shape, config.dataset.num_classes or classes


def eval_batch_size(config: Any) -> int:
    """Returns the batch size for evaluation: by default that of one training step, which needs more memory."""
    return config.eval.batch_size or max(1, config.train.batch_size // config.optimizer.accumulate_steps)


def check_config(config: Any, devices: int = 1) -> None:
    """Raises ConfigError if a value is invalid or contradicts another; imports `model.plugins` first.

    Args:
      config: a nested config with the fields of configs/base.py.
      devices: the number of devices that share a batch.
    """
    values = dict(flatten(config))
    problems = [f"{field} is missing: start from configs/base.py" for field in FIELDS if field not in values]
    problems += [f"{field} is not a field of configs/base.py: remove it" for field in values if field not in FIELDS]
    sound = {}
    for field in filter(values.__contains__, FIELDS):
        if wrong := FIELDS[field].check(values[field]):
            problems.append(f"{field} is {values[field]!r}: it must be {wrong}")
        else:
            sound[field] = values[field]
    problems += _contradictions(sound, devices)
    if problems:
        raise ConfigError("\n".join(problems))


def _contradictions(values: dict[str, Any], devices: int) -> Iterator[str]:
    """Yields the contradictions between fields; `values` holds only the fields that are valid on their own."""
    yield from _wrong_models(values)
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
            "give both one value per channel, or both () to take them from the data"
        )
    if ERASE in (names := values.get("dataset.augment", ()))[:-1]:
        yield f"dataset.augment is {names}: {ERASE} must come last, and only once"
    epochs, boundaries = values.get("train.epochs"), values.get("optimizer.boundaries", ())
    if epochs is not None:
        steps = boundary_steps(boundaries, epochs, 1000)
        if steps != sorted(set(steps)):
            yield f"optimizer.boundaries is {boundaries}: put them in order, each once"
        if values.get("optimizer.schedule") == "step" and max(steps, default=0) > epochs * 1000:
            fractions = (
                (0.5, 0.75)
                if len(boundaries) == 2
                else tuple(round((place + 1) / (len(boundaries) + 1), 3) for place in range(len(boundaries)))
            )
            yield (
                f"optimizer.boundaries is {boundaries}: the run ends at train.epochs={epochs}; set fractions of the "
                f"run, such as --config.optimizer.boundaries='{fractions}'"
            )
        if (warmup := values.get("optimizer.warmup_epochs", 0)) > epochs:
            yield (
                f"optimizer.warmup_epochs is {warmup}: the run ends at train.epochs={epochs}; set less, such as "
                f"--config.optimizer.warmup_epochs={epochs / 10:g}"
            )
    if values.get("optimizer.nesterov") and values.get("optimizer.momentum") == 0:
        yield "optimizer.nesterov is True: it needs optimizer.momentum above 0"
    name = values.get("optimizer.name", "sgd")
    for field in dict.fromkeys(field for own in OPTIMIZERS.values() for field in own):
        full = f"optimizer.{field}"
        if field not in OPTIMIZERS[name] and values.get(full, FIELDS[full].default) != FIELDS[full].default:
            owners = " and ".join(owner for owner, own in OPTIMIZERS.items() if field in own)
            yield f"{full} is {values[full]!r}: it is for optimizer.name {owners}, not {name}"
    if values.get("dataset.validation") and not (
        values.get("checkpoint.keep_best", 1) and values.get("eval.every_epochs", 1)
    ):
        yield (
            f"dataset.validation is {values['dataset.validation']:g}: to choose the best checkpoint, "
            "checkpoint.keep_best and eval.every_epochs must be at least 1"
        )
    if len(values.get("optimizer.betas", (0, 0))) != 2 or 1 in values.get("optimizer.betas", ()):
        yield f"optimizer.betas is {values['optimizer.betas']}: it must be two numbers below 1, such as (0.9, 0.999)"
    for field in ("model.new_head", "model.adapt_stem"):
        if values.get(field) and values.get("model.init_from") == "":
            yield f"{field} is True: it needs model.init_from, a file of weights"
    if values.get("dataset.name") == "folder" and values.get("dataset.data_dir") == "":
        yield "dataset.data_dir is '': name the directory of train/ and test/, with --config.dataset.data_dir=DIR"
    yield from _streaming_contradictions(values)


def _wrong_models(values: dict[str, Any]) -> Iterator[str]:
    try:
        import_plugins(values.get("model.plugins", ()))
    except ValueError as error:
        yield f"model.plugins: {error}"
        return
    overrides = {option: f"model.overrides.{option}" for option in OPTIONS}
    if values.keys() >= {"model.name", *overrides.values()}:
        options = {option: values[field] for option, field in overrides.items()}
        try:
            check_model(values["model.name"], **options)
        except (ValueError, TypeError) as error:
            yield f"model: {error}"
        yield from _wrong_variants(values.get("compare.models", ()), options)


def _streaming_contradictions(values: dict[str, Any]) -> Iterator[str]:
    name, in_memory = values.get("dataset.name", "folder"), values.get("dataset.in_memory", "auto")
    augment = values.get("dataset.augment", ())
    if name not in stream.STREAMED:
        if in_memory == "never":
            yield f"dataset.in_memory is 'never': only {' and '.join(stream.STREAMED)} can be streamed, not {name}"
        if stream.CROP in augment:
            yield (
                f"dataset.augment has {stream.CROP}, which is for photographs of any size "
                f"({' and '.join(stream.STREAMED)}): {name} takes 'crop'"
            )
        return
    if in_memory == "always" and name == "imagenet2012":
        yield "dataset.in_memory is 'always': imagenet2012 does not fit in memory, set it to auto"
    if stream.CROP in augment:
        if in_memory == "always":
            yield f"dataset.in_memory is 'always': {stream.CROP} runs while decoding, set it to auto or never"
        if stream.CROP in augment[1:]:
            yield f"dataset.augment is {augment}: {stream.CROP} must come first, and only once"
    streamed = stream.CROP in augment or in_memory == "never"
    if streamed and name == "folder" and values.get("dataset.image_size") == 0:
        yield "dataset.image_size is 0: streamed images need one size, such as 224"


def _wrong_variants(variants: Sequence[str], overrides: dict[str, Any]) -> Iterator[str]:
    """Yields the problems of compare.models, whose own options take precedence over `model.overrides`."""
    seen: dict[str, str] = {}
    for text in variants:
        try:
            name, options = parse_variant(text)
            for option, value in options.items():
                if wrong := FIELDS[f"model.overrides.{option}"].check(value):
                    raise ValueError(f"{option} is {value!r}: it must be {wrong}")
            check_model(name, **overrides | options)
        except (ValueError, TypeError) as error:
            yield f"compare.models, {text!r}: {error}"
            continue
        if (same := seen.setdefault(repr((name, sorted(options.items()))), text)) is not text:
            yield f"compare.models has {same!r} and {text!r}: name each model once"
