"""The models by name."""

from __future__ import annotations

import ast
import difflib
import fnmatch
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from regnet_flax.models import ops as ops_lib
from regnet_flax.models.backbone import chosen
from regnet_flax.models.families.names import OTHERS, RESNETS
from regnet_flax.models.families.rlanet import RLANet
from regnet_flax.models.regnet import RegNet
from regnet_flax.models.regnety import RegNetY
from regnet_flax.models.regulators import REGULATORS


class Option(NamedTuple):
    """An option of create_model that a config can also set, as `model.overrides.NAME`.

    Attributes:
      kind: the type of its values; None, the default in a config, keeps the model's own value.
      comment: the description that users read.
      choices: the valid values; () for no such list.
      rounding: whether a model computes the same with all its values, up to rounding.
    """

    kind: type
    comment: str
    choices: tuple[str, ...] = ()
    rounding: bool = False


OPTIONS = {
    "kernel": Option(
        str,
        'the regulators\' convolutions: "separable" or "dense"',
        ("separable", "dense"),
    ),
    "share_regulator": Option(bool, "one regulator for all blocks of a stage, or one per block"),
    "regulator_grouping": Option(
        str,
        'how separable regulators group channels: "pairs", X[c] with H[c], or "contiguous", neighbours in [X, H]',
        ("pairs", "contiguous"),
    ),
    "normalize_state": Option(
        str,
        'the part of the state that goes through ReLU(BN(·)): "h", H; "hc", an LSTM\'s C too; or "none"',
        ("h", "hc", "none"),
    ),
    "share_state_norm": Option(bool, "one batch normalisation of the state per stage, or one per block"),
    "regulated_stages": Option(tuple, "such as (1, 2); None: all"),
    "shortcut": Option(str, '"B", a 1×1 convolution, or "A", without parameters', ("A", "B")),
    "width": Option(int, "channels of the first stage"),
    "bottleneck_stride": Option(
        str, '"1x1", or "3x3" as in torchvision (not for regnet50_… and regnet101_…)', ("1x1", "3x3")
    ),
    "init": Option(str, 'initial values: "paper" or "torch"', ("paper", "torch")),
    "fuse_init": Option(
        str,
        'initial values of the convolutions that fuse X with H: "he", or "identity", which ignores H at first',
        ("he", "identity"),
    ),
    "unroll": Option(int, "blocks per step of nn.scan; None: all on a CPU, 3 on a GPU, 1 elsewhere", rounding=True),
    "remat": Option(bool, "recompute each block in the backward pass, to save memory", rounding=True),
    "ops": Option(
        str, 'the arithmetic: "auto", "plain", "cpu" or "gpu"; see create_model', ops_lib.CHOICES, rounding=True
    ),
}
# Options for Python, not for a config.
_BACKBONE = ("features", "frozen_batch_stats")
_KNOWN: dict[Any, tuple[str, ...]] = {
    RegNet: (*OPTIONS, "scan", "output_stride"),
    RegNetY: (),
    RLANet: ("width", "bottleneck_stride", "init"),
}
# Options that cannot be changed in a model that sets them.
_FIXED = ("kernel", "share_regulator", "normalize_state")
_EXAMPLE = "regnet20_convlstm kernel=dense regulated_stages=(1, 2)"


def computing_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the given options, without None and without those that only change how a model rounds."""
    return {
        name: value
        for name, value in given.items()
        if value is not None and not (name in OPTIONS and OPTIONS[name].rounding)
    }


def family(regulators: Iterable[str | None]) -> dict[str, functools.partial[nn.Module]]:
    """Returns the ResNets of all depths with each of these regulators (None for no regulator), by name."""
    return {name: functools.partial(RegNet, **fields) for name, fields in RESNETS.names(regulators)}


MODELS = family((None, *REGULATORS))
_PROJECTS = {"share_regulator": False, "kernel": "dense", "normalize_state": "none", "initial": "torch"}
_PROJ = _PROJECTS | {"regulator": "convlstm"}
_RNN = _PROJECTS | {"replace": True, "stage_sizes": (3, 3, 3)}
MODELS |= {
    "regnet_proj_cifar": functools.partial(RegNet, **_PROJ, stage_sizes=(2, 2, 2), stem="cifar_pool"),
    "regnet_proj_imagenet": functools.partial(RegNet, **_PROJ, stage_sizes=(3, 4, 6, 3), stem="imagenet", width=64),
    "resnet_rnn20_convrnn": functools.partial(RegNet, **_RNN, regulator="convrnn"),
    "resnet_rnn20_convgru": functools.partial(RegNet, **_RNN, regulator="replacing_convgru"),
    "regnety_400mf": functools.partial(RegNetY),
}
MODELS |= {
    name: functools.partial(RegNet, **fields) for others in OTHERS for name, fields in others.names((None, *REGULATORS))
}
MODELS |= {
    "rla_resnet50": functools.partial(RLANet),
    "rla_resnet101": functools.partial(RLANet, stage_sizes=(3, 4, 23, 3)),
}


def list_models(pattern: str = "*") -> list[str]:
    """Lists the registered names that match a shell pattern, such as "*gru*"; create_model accepts other sizes too."""
    return fnmatch.filter(MODELS, pattern)


def _resolve(name: str) -> functools.partial[nn.Module]:
    if name in MODELS:
        return MODELS[name]
    for family in (RESNETS, *OTHERS):
        try:
            fields = family.parse(name, REGULATORS)
        except ValueError as error:
            raise ValueError(f"unknown model {name!r}: {error}") from None
        if fields is not None:
            return functools.partial(RegNet, **fields)
    close = difflib.get_close_matches(name, MODELS, n=3, cutoff=0.3)
    raise ValueError(f"unknown model {name!r}: the closest names are {', '.join(close) or ', '.join(list(MODELS)[:3])}")


def parse_variant(text: str) -> tuple[str, dict[str, Any]]:
    """Parses a model's name and options, such as "regnet20_convlstm kernel=dense regulated_stages=(1, 2)".

    Values are Python literals, or words without quotes; create_model checks whether they are valid.

    Raises:
      ValueError: the text has another form, or an option is not one of OPTIONS or appears twice.
    """
    name, *rest = text.split(maxsplit=1)[:2] if text.strip() else ("",)
    parts = re.split(r"\s+(?=\w+\s*=)", rest[0].strip()) if rest else []
    options: dict[str, Any] = {}
    for part in parts:
        match = re.fullmatch(r"(\w+)\s*=\s*(.+)", part)
        if not name or not match:
            raise ValueError(f"{part!r} is not understood: write NAME OPTION=VALUE …, such as {_EXAMPLE!r}")
        key, value = match.groups()
        if key in options:
            raise ValueError(f"{key} is given twice")
        if key not in OPTIONS:
            close = difflib.get_close_matches(key, OPTIONS, n=1) or OPTIONS
            raise ValueError(f"there is no option {key!r}: did you mean {' or '.join(close)}?")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            if not re.fullmatch(r"\w+", value):
                raise ValueError(f"{key}={value} is not understood: write it as in {_EXAMPLE!r}") from None
            options[key] = value
        if isinstance(options[key], list):
            options[key] = tuple(options[key])
    if not name:
        raise ValueError(f"a model's name is missing: write NAME OPTION=VALUE …, such as {_EXAMPLE!r}")
    return name, options


def create_model(
    name: str,
    num_classes: int = 10,
    dtype: Any = jnp.float32,
    axis_name: str | None = None,
    *,
    ops: str | ops_lib.Ops | None = "auto",
    devices: Sequence[Any] | None = None,
    **options: Any,
) -> nn.Module:
    """Makes a model by name.

    Args:
      name: one of `list_models()`, or another size of one of its families: any CIFAR depth 6m+2, such as
        "regnet14_convlstm" and "preact_resnet56", 6m+4 for wide ones, "wrn16_4", "resnext50_16x8d", "wide_resnet50_4".
      num_classes: 0 gives pooled features.
      dtype: the dtype of the arithmetic, float32 or bfloat16; parameters, statistics and logits are float32.
      axis_name: the pmap or shard_map axis over which batch normalisation is synchronised.
      ops: the arithmetic. "plain" is JAX's own; "cpu" has gradients that are fast on a CPU and, if there is a C++
        compiler, native operations for convolutions, batch normalisation and the steps of the separable cells, which
        run only on CPUs and which `jax.export` refuses; "gpu" has the separable ConvLSTM's step as Pallas kernels, slow
        on anything but a GPU. Their results are equal up to rounding. "auto", or None, means "cpu" on CPUs, "gpu" on
        NVIDIA's GPUs of compute capability 8.0 or later, and "plain" elsewhere. You can also pass your own `Ops`.
        "cpu" and "gpu" define their own reverse rules, so forward mode (`jax.jvp`, `jax.jacfwd`, `jax.linearize`)
        raises a TypeError, and so do second derivatives with "gpu"; Hessian-vector products as `jax.jvp` of `jax.grad`
        and gradients of gradients work with "cpu". For everything else use "plain".
      devices: the devices that will run the model; their platform decides "auto", and whether a stage's blocks are
        unrolled. None means JAX's default device.
      **options: kernel, share_regulator, regulator_grouping, normalize_state, share_state_norm, regulated_stages,
        shortcut, width, bottleneck_stride, init (RegNet's `initial`), fuse_init, unroll, remat, scan, features,
        output_stride and frozen_batch_stats; see RegNet. None keeps the default: the model's, and for unroll all
        blocks on a CPU, 3 on a GPU that has ops="gpu" by default, and 1 elsewhere.

    Returns:
      A Flax module; `model.init(key, images, train=False)` makes its variables, and `model.stage_info` lists the
      name, channels and stride of each feature.

    Raises:
      ValueError: the name is unknown (the message has the closest names), an option is unknown, or a value is invalid.
    """
    model = check_model(name, num_classes, ops=ops, **options)
    kind = ops_lib.kind_of(devices)
    fields: dict[str, Any] = {"ops": ops_lib.choose(ops or "auto", kind)}
    if isinstance(model, RegNet) and model.unroll is None and kind != "cpu":
        fields["unroll"] = 3 if kind == "gpu" else 1
    return model.clone(dtype=dtype, axis_name=axis_name, **fields)


def check_model(
    name: str, num_classes: int = 10, *, ops: str | ops_lib.Ops | None = "auto", **options: Any
) -> RegNet | RegNetY | RLANet:
    """Makes the model of `create_model`, with the same errors, but leaves open what depends on the devices."""
    make = _resolve(name)
    known = {*_KNOWN[make.func], "ops", *_BACKBONE}
    given = {key: value for key, value in options.items() if value is not None}
    if ops is not None and not isinstance(ops, ops_lib.Ops):
        given["ops"] = ops
    for key, value in given.items():
        if key not in known:
            others = {"num_classes", "dtype", "axis_name", "ops", "devices"}
            close = difflib.get_close_matches(key, known | others, n=1) or sorted(known & set(OPTIONS))
            hint = f"did you mean {', '.join(close)}?" if close else "leave it out"
            raise ValueError(f"model {name!r} has no option {key!r}: {hint}")
        if key in _FIXED and make.keywords.get(key, value) != value:
            raise ValueError(f"{key} is {value!r}: in {name} it is always {make.keywords[key]!r}")
        choices = OPTIONS[key].choices if key in OPTIONS else ()
        if choices and value not in choices:
            raise ValueError(f"{key} is {value!r}: it must be one of {', '.join(map(repr, choices))}")
        kind = bool if key == "frozen_batch_stats" else OPTIONS[key].kind if key in OPTIONS else None
        if kind is bool and not isinstance(value, (bool, np.bool_)):
            raise ValueError(f"{key} is {value!r}: it must be True or False")
        if kind is tuple and (isinstance(value, str) or not isinstance(value, Iterable)):
            raise ValueError(f"{key} is {value!r}: it must be a tuple, such as (1, 2)")
        if key == "features" and not isinstance(value, (Iterable, bool)):
            raise ValueError(f"features is {value!r}: it must be True or names, such as ('stage2', 'stage3')")
        if key in ("width", "unroll", "output_stride") and (
            not isinstance(value, int) or isinstance(value, bool) or value < 1
        ):
            raise ValueError(f"{key} is {value!r}: it must be a whole number of at least 1")
    if num_classes < 0:
        raise ValueError(f"num_classes is {num_classes}: it must be 0, for pooled features, or more")
    given.pop("ops", None)
    fields: dict[str, Any] = make.keywords | given
    if "init" in fields:  # linen modules have a method of that name
        fields["initial"] = fields.pop("init")
    if "regulated_stages" in given:
        stages = len(fields["stage_sizes"])
        wrong = [stage for stage in given["regulated_stages"] if stage not in range(1, stages + 1)]
        if wrong:
            raise ValueError(f"regulated_stages has {wrong[0]!r}: the stages of {name} are 1 to {stages}")
        fields["regulated_stages"] = tuple(given["regulated_stages"])
    if fields.get("bottleneck_stride", "1x1") == "3x3" != make.keywords.get("bottleneck_stride") and fields.get(
        "regulator", "dia"
    ) not in (None, "dia"):
        raise ValueError(f"bottleneck_stride is '3x3': in {name}, X2 must have the size of H; use '1x1'")
    if fields.get("share_state_norm") and fields.get("normalize_state") == "none":
        raise ValueError("share_state_norm is True: with normalize_state 'none' there is nothing to share")
    if fields.get("replace") and fields.get("fuse_init") == "identity":
        raise ValueError(f"fuse_init is 'identity': in {name} H replaces X, and nothing is fused; leave it out")
    model: Any = make.func(**fields, num_classes=num_classes)
    wanted = chosen(model.features, model.stage_info)
    if not isinstance(model.features, bool):
        model = make.func(**fields | {"features": wanted}, num_classes=num_classes)
    return model
