"""Every field of a config, one row each: its default, its valid values and its meaning.

configs/base.py is built from these rows; the other configs start from it. Override a field on the command line with
--config.train.batch_size=64; a tuple with --config.dataset.mean='(0.5,)'.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from regnet_flax.data import stream
from regnet_flax.data.augment import AUGMENTATIONS, ERASE
from regnet_flax.data.sources import SOURCES
from regnet_flax.files import LOCAL, is_remote
from regnet_flax.models.registry import OPTIONS, Option
from regnet_flax.places import in_bucket

SCHEDULES = ("step", "cosine", "constant")
# Each optimiser with the fields that only it uses.
OPTIMIZERS = {"sgd": ("momentum", "nesterov"), "adamw": ("betas",), "lamb": ("betas",)}
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")

Check = Callable[[Any], str]  # "" for a valid value, otherwise what the value must be


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


def _path(value: Any) -> str:
    return _text(value) or (LOCAL if is_remote(value) and not in_bucket(value) else "")


def _flag(value: Any) -> str:
    return "" if isinstance(value, bool) else "True or False"


def _each(check: Check) -> Check:
    def check_all(value: Any) -> str:
        if not isinstance(value, (tuple, list)):
            return "a tuple, such as '(1, 2)'"
        wrong = next((problem for problem in map(check, value) if problem), "")
        return f"a tuple, each {wrong}" if wrong else ""

    return check_all


def _modules(value: Any) -> str:
    names = isinstance(value, (tuple, list)) and all(isinstance(name, str) for name in value)
    if names and all(part.isidentifier() for name in value for part in name.split(".")):
        return ""
    return "a tuple of module names, such as \"('my_module',)\""


def _tracker(value: Any) -> str:
    module, colon, name = value.partition(":") if isinstance(value, str) else ("", "", "")
    own = colon and name.isidentifier() and all(part.isidentifier() for part in module.split("."))
    return "" if own or value in TRACKERS else f"one of {', '.join(TRACKERS)}, or a class of yours, 'module:Class'"


def _checkpoint(value: Any) -> str:
    known = isinstance(value, str) and (value in ("best", "last") or value.isdecimal())
    return "" if known or not _whole(0)(value) else "best, last or a step"


def _count_or_fraction(value: Any) -> str:
    good = not _number(0)(value) and (value < 1 or value == int(value))
    return "" if good else "0, a whole number, or a fraction between 0 and 1"


@dataclasses.dataclass(frozen=True)
class Field:
    """A row of FIELDS.

    Attributes:
      default: the value in configs/base.py; a config.json of an earlier version that lacks the field means this value.
      check: returns "" for a valid value, otherwise what the value must be.
      comment: the description that users read.
      may_change: whether a run may resume with another value, because it changes no number that training computes,
        or only its rounding, like another device.
      from_data: whether the default means "from the data set".
      kind: the type of the values, where the default None does not tell.
    """

    default: Any
    check: Check
    comment: str
    _: dataclasses.KW_ONLY
    may_change: bool = False
    from_data: bool = False
    kind: type | None = None


def _override(option: Option) -> Field:
    """Returns the row of an option of create_model, which itself checks what this does not."""
    checks = {bool: _flag, tuple: _each(_whole(1))}

    def check(value: Any) -> str:
        return "" if value is None or option.kind not in checks else checks[option.kind](value)

    return Field(None, check, option.comment, kind=option.kind, may_change=option.rounding)


_DATA_SETS = tuple(dict.fromkeys((*SOURCES, *stream.STREAMED)))

FIELDS: dict[str, Field] = {
    "seed": Field(0, _whole(0), "seeds the initial weights, the order of the examples and their augmentation"),
    "dtype": Field(
        "float32",
        _choice("float32", "bfloat16"),
        'type for the arithmetic, or "bfloat16"; parameters and batch statistics stay float32',
    ),
    "model.name": Field(
        "regnet20_convlstm", _text, "see `regnet_flax.list_models()`; any CIFAR depth 6m+2 is accepted"
    ),
    "model.plugins": Field(
        (),
        _modules,
        "modules to import first, such as ('my_module',), which register regulators: see `register_regulator`",
        may_change=True,
    ),
    "model.init_from": Field(
        "",
        _path,
        "a .safetensors or .pth file of weights with PyTorch's names, to start from or to evaluate; a network with "
        "regulators also takes the plain network's weights, and then starts as that network",
    ),
    "model.new_head": Field(False, _flag, "ignore that file's head, as for another number of classes"),
    "model.adapt_stem": Field(
        False,
        _flag,
        "use that file's weights for colour images on grey ones, summed over the channels, or the reverse",
    ),
    # None: the model's own default.
    **{f"model.overrides.{name}": _override(option) for name, option in OPTIONS.items()},
    "dataset.name": Field("digits", _choice(*_DATA_SETS), f"one of {', '.join(_DATA_SETS)}"),
    "dataset.data_dir": Field(
        "",
        _path,
        "TFDS's data_dir (\"\": TFDS's own default), or the folder with train/ and test/ (and val/)",
        may_change=True,
    ),
    "dataset.num_classes": Field(0, _whole(0), "0: from the data", from_data=True),
    "dataset.validation": Field(
        0.0,  # takes 5000 as well as 0.1
        _count_or_fraction,
        'number (5000) or fraction (0.1) of training images to hold out for choosing "best"; 0: none',
    ),
    "dataset.in_memory": Field(
        "auto",
        _choice("auto", "always", "never"),
        '"always": hold it on the device as uint8; "never": stream it; "auto": stream imagenet2012, folders of '
        f"more than 4 GiB once decoded, and any data set with {stream.CROP} in `augment`",
        may_change=True,
    ),
    "dataset.workers": Field(
        0, _whole(0, 1024), "processes that decode streamed images; 0: threads of this process", may_change=True
    ),
    "dataset.prefetch": Field(
        2, _whole(1, 1024), "batches that each of these processes (or this one) keeps ready", may_change=True
    ),
    "dataset.strict": Field(False, _flag, "fail on an image that does not decode, instead of listing and skipping it"),
    "dataset.image_size": Field(
        0, _whole(0, 8192), "resize images to this height and width; 0: leave them as they are", from_data=True
    ),
    "dataset.augment": Field(
        (),
        _each(_choice(stream.CROP, *AUGMENTATIONS, ERASE)),
        f"for training images, in the order given: any of {', '.join(AUGMENTATIONS)}; {ERASE} must come last; "
        f"{stream.CROP} may come first if streamed",
    ),
    "dataset.mean": Field(
        (), _each(_number(-10, 10)), "per channel, for pixels in 0…1; (): from the training images", from_data=True
    ),
    "dataset.std": Field((), _each(_number(0, 10, above=True)), "likewise", from_data=True),
    "train.batch_size": Field(128, _whole(1), "over all devices"),
    # The cosine schedule and boundaries given as fractions depend on it: `optimizer.changed_rate` tells whether that
    # changes a learning rate already used.
    "train.epochs": Field(200, _whole(1), "may change on resuming if no rate already used changes", may_change=True),
    "train.max_steps": Field(
        0, _whole(0), "stop after this many steps; 0: no limit. It does not affect the schedule", may_change=True
    ),
    "train.steps_per_call": Field(
        0, _whole(0), "steps in one compiled call; 0: 50, or 1 on a CPU or for streamed data", may_change=True
    ),
    "train.batch_norm": Field(
        "sync",
        _choice("sync", "local"),
        '"sync": statistics over the batch of all devices; "local": over each device\'s part',
    ),
    "train.mixup": Field(
        0.0, _number(0, 1000), "mix pairs of images, with a share drawn from Beta(mixup, mixup), such as 0.2; 0: none"
    ),
    "train.cutmix": Field(
        0.0,
        _number(0, 1000),
        "paste a box from the pair's other image, with an area from Beta(cutmix, cutmix), such as 1.0; 0: none. With "
        "mixup too, each step uses one of the two at random",
    ),
    "optimizer.name": Field("sgd", _choice(*OPTIMIZERS), f"one of {', '.join(OPTIMIZERS)}"),
    "optimizer.learning_rate": Field(0.1, _number(0, 1e6, above=True), "after the warm-up, before any decay"),
    "optimizer.momentum": Field(0.9, _number(0, 1), 'for "sgd"; 0: none'),
    "optimizer.nesterov": Field(False, _flag, 'Nesterov momentum, for "sgd"'),
    "optimizer.betas": Field((0.9, 0.999), _each(_number(0, 1)), 'decay rates of both moments, for "adamw" and "lamb"'),
    "optimizer.weight_decay": Field(
        1e-4, _number(0, 1e6), 'L2 for "sgd"; decoupled, times the learning rate, for "adamw" and "lamb"'
    ),
    "optimizer.decayed": Field(
        "all",
        _choice("all", "kernels", "outside_regulators"),
        'which weights decay; "kernels": neither biases nor normalisation parameters; "outside_regulators": all except '
        "the regulators' weights",
    ),
    "optimizer.schedule": Field("step", _choice(*SCHEDULES), f"learning-rate schedule: {', '.join(SCHEDULES)}"),
    "optimizer.boundaries": Field(
        (0.5, 0.75),
        _each(_number(0, 1e9, above=True)),
        'for "step": epochs, or fractions of the run if below 1',
    ),
    "optimizer.decay": Field(0.1, _number(0, 1, above=True), 'for "step": the factor at each boundary'),
    "optimizer.warmup_epochs": Field(0.0, _number(0), "epochs over which the rate first rises linearly"),
    "optimizer.label_smoothing": Field(0.0, _number(0, 1), "share of the target spread evenly over all classes"),
    "optimizer.clip_norm": Field(0.0, _number(0), "largest norm of the gradient; 0: no limit"),
    "optimizer.accumulate_steps": Field(
        1, _whole(1), "process a batch in this many parts to save memory; batch norm sees each part separately"
    ),
    "optimizer.ema_decay": Field(
        0.0,
        _number(0, 0.99999),
        "decay of the averages of weights and batch statistics, which are then evaluated and exported; at most "
        "(1 + t) / (10 + t) after t steps; 0: none",
    ),
    "eval.batch_size": Field(
        0,
        _whole(0),
        "over all devices, rounded up to a multiple of them; 0: as many as training processes at once",
        may_change=True,
    ),
    "eval.every_epochs": Field(1, _whole(0), "0: never", may_change=True),
    "eval.checkpoint": Field(
        "best", _checkpoint, 'which one eval, predict, demo and so on use: "best", "last" or a step', may_change=True
    ),
    "log.every_steps": Field(100, _whole(0), "0: only at evaluations", may_change=True),
    "log.trackers": Field(
        ("tensorboard",),
        _each(_tracker),
        f"where the log goes besides metrics.jsonl: {', '.join(TRACKERS)}, or a class of yours, 'module:Class'",
        may_change=True,
    ),
    "checkpoint.every_steps": Field(0, _whole(0), "0: every epoch", may_change=True),
    "checkpoint.keep": Field(2, _whole(1), "how many of the newest to keep", may_change=True),
    "checkpoint.keep_best": Field(
        1, _whole(0), "and how many of those with the highest accuracy on the evaluated split", may_change=True
    ),
    "predict.images": Field("", _path, "for --mode predict: a file, a folder, or a glob of them", may_change=True),
    "predict.top": Field(5, _whole(1), "classes shown for each image", may_change=True),
    "predict.json": Field(
        False,
        _flag,
        "JSON on standard output instead of a table; everything else goes to standard error",
        may_change=True,
    ),
    "demo.host": Field(
        "127.0.0.1",
        _text,
        "for --mode demo: the page's address; only this machine reaches the default",
        may_change=True,
    ),
    "demo.port": Field(8000, _whole(0, 65535), "the page's port; 0: any free one", may_change=True),
    "compare.models": Field(
        (),
        _each(_text),
        'for --mode compare: the baseline first; options follow the name: "regnet20_convgru kernel=dense"',
        may_change=True,
    ),
    "compare.seeds": Field(
        (0, 1, 2), _each(_whole(0)), "of each model; compare.together: how they train", may_change=True
    ),
    "compare.together": Field(
        "auto",
        _choice("auto", "always", "never", "apart"),
        'how seeds step; "always": at once by vmap; "never": in turn, in the memory of one; "auto": in turn on CPUs; '
        '"apart": one run after another, each in a folder of its own, so that seeds can be added later',
    ),
    "export.format": Field(
        "safetensors",
        _choice("stablehlo", "safetensors", "torch"),
        'for --mode export; or "torch": weights with PyTorch\'s names; "stablehlo": the model as a program',
        may_change=True,
    ),
    "export.path": Field(
        "", _path, '"": weights.safetensors, weights.pth or model.stablehlo in the workdir', may_change=True
    ),
}


def default_config() -> Any:
    """Makes the ConfigDict that every config starts from; each field has its default.

    Returns:
      A nested `ml_collections.ConfigDict`. A field keeps the type of its default; one of `model.overrides` takes its
      option's type, or None.
    """
    from ml_collections import config_dict

    tree: dict[str, Any] = {}
    for name, field in FIELDS.items():
        *sections, last = name.split(".")
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
        section[last] = config_dict.placeholder(field.kind) if field.kind else field.default
    return config_dict.ConfigDict(tree)


def describe() -> str:
    """Lists the fields for the terminal, one per line: name, default and comment."""
    width = max(map(len, FIELDS))
    return "".join(f"{name:{width}}  {field.default!r:19}  {field.comment}\n" for name, field in FIELDS.items())


def boundary_steps(boundaries: Sequence[float], epochs: float, steps_per_epoch: int) -> list[int]:
    """Returns the steps at which the step schedule decays; a boundary below 1 is a fraction of the run."""
    return [round((b * epochs if b < 1 else b) * steps_per_epoch) for b in boundaries]
