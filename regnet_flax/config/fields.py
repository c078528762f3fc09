"""Each config field: which values are sound in themselves, and in which a run may be resumed with another."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from regnet_flax.data import stream
from regnet_flax.data.augment import AUGMENTATIONS, ERASE
from regnet_flax.data.sources import SOURCES
from regnet_flax.models.ops import CHOICES
from regnet_flax.models.registry import OPTIONS

SCHEDULES = ("step", "cosine", "constant")
OPTIMIZERS = ("sgd", "adamw", "lamb")

Check = Callable[[Any], str]  # "" for a good value, otherwise what the value must be


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


def _count_or_fraction(value: Any) -> str:
    good = not _number(0)(value) and (value < 1 or value == int(value))
    return "" if good else "0, a whole number, or a fraction between 0 and 1"


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
    "model.overrides.ops": _optional(_choice(*CHOICES)),
    "dataset.name": _choice(*dict.fromkeys((*SOURCES, *stream.STREAMED))),
    "dataset.data_dir": _text,
    "dataset.num_classes": _whole(0),
    "dataset.validation": _count_or_fraction,
    "dataset.in_memory": _choice("auto", "always", "never"),
    "dataset.workers": _whole(0, 1024),
    "dataset.prefetch": _whole(1, 1024),
    "dataset.strict": _flag,
    "dataset.image_size": _whole(0, 8192),
    "dataset.augment": _each(_choice(stream.CROP, *AUGMENTATIONS, ERASE)),
    "dataset.mean": _each(_number(-10, 10)),
    "dataset.std": _each(_number(0, 10, above=True)),
    "train.batch_size": _whole(1),
    "train.epochs": _whole(1),
    "train.max_steps": _whole(0),
    "train.steps_per_call": _whole(0),
    "train.batch_norm": _choice("sync", "local"),
    "train.mixup": _number(0, 1000),
    "train.cutmix": _number(0, 1000),
    "optimizer.name": _choice(*OPTIMIZERS),
    "optimizer.learning_rate": _number(0, 1e6, above=True),
    "optimizer.momentum": _number(0, 1),
    "optimizer.nesterov": _flag,
    "optimizer.weight_decay": _number(0, 1e6),
    "optimizer.betas": _each(_number(0, 1)),
    "optimizer.decayed": _choice("all", "kernels"),
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
# The fields that earlier versions did not have, and the values that are those of their runs.
ADDED = {"dataset.validation": 0, "optimizer.name": "sgd", "optimizer.decayed": "all", "optimizer.betas": (0.9, 0.999)}
# The values that stand for "from the data set".
AUTOMATIC = {"dataset.num_classes": 0, "dataset.image_size": 0, "dataset.mean": (), "dataset.std": ()}


def boundary_steps(boundaries: Sequence[float], epochs: float, steps_per_epoch: int) -> list[int]:
    """The steps from which the step schedule's decays hold; a boundary below 1 is a fraction of the run."""
    return [round((b * epochs if b < 1 else b) * steps_per_epoch) for b in boundaries]
