"""The models by name."""

from __future__ import annotations

import ast
import difflib
import fnmatch
import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from regnet_flax.models import ops as ops_lib
from regnet_flax.models.backbone import chosen
from regnet_flax.models.families.names import OTHERS, RESNETS
from regnet_flax.models.families.rlanet import RLANet
from regnet_flax.models.regnet import RegNet
from regnet_flax.models.regnety import RegNetY
from regnet_flax.models.regulators import REGULATORS


class Option(NamedTuple):
    """An option of create_model that a config may give too, as `model.overrides.NAME`.

    Attributes:
      kind: the type of its values; None, the default in a config, leaves the model's own.
      comment: what a user reads of it.
      choices: the values that it takes; () for no such list.
    """

    kind: type
    comment: str
    choices: tuple[str, ...] = ()


OPTIONS = {
    "kernel": Option(
        str,
        'of the regulators: "separable" or "dense"',
        ("separable", "dense"),
    ),
    "share_regulator": Option(bool, "one for all blocks of a stage, or one each"),
    "regulator_grouping": Option(
        str,
        'what separable regulators put together: "pairs", X[c] with H[c], or "contiguous", neighbours in [X, H]',
        ("pairs", "contiguous"),
    ),
    "normalize_state": Option(
        str,
        'what of the state goes through ReLU(BN(·)): "h", H; "hc", an LSTM\'s C too; or "none"',
        ("h", "hc", "none"),
    ),
    "share_state_norm": Option(bool, "one batch normalisation of the state for all blocks of a stage, or one each"),
    "regulated_stages": Option(tuple, "such as (1, 2); None: all"),
    "shortcut": Option(str, '"B", a 1×1 convolution, or "A", without parameters', ("A", "B")),
    "width": Option(int, "channels of the first stage"),
    "bottleneck_stride": Option(str, '"1x1", or "3x3" as torchvision has it (ResNets only)', ("1x1", "3x3")),
    "init": Option(str, 'initial values: "paper" or "torch"', ("paper", "torch")),
    "fuse_init": Option(
        str,
        'where the convolutions that fuse X with H start: "he", or "identity", which leaves H out at first',
        ("he", "identity"),
    ),
    "unroll": Option(int, "blocks per step of nn.scan; None: all on a CPU, 1 elsewhere"),
    "remat": Option(bool, "recompute each block in the backward pass, to save memory"),
    "ops": Option(str, 'the arithmetic: "auto", "plain", "cpu" or "gpu"; see create_model', ops_lib.CHOICES),
}
# What may be given in Python, and not in a config.
_BACKBONE = ("features", "frozen_batch_stats")
_KNOWN: dict[Any, tuple[str, ...]] = {
    RegNet: (*OPTIONS, "scan", "output_stride"),
    RegNetY: (),
    RLANet: ("width", "bottleneck_stride", "init"),
}
# What a model that gives it always has.
_FIXED = ("kernel", "share_regulator", "normalize_state")
_EXAMPLE = "regnet20_convlstm kernel=dense regulated_stages=(1, 2)"


def family(regulators: Iterable[str | None]) -> dict[str, functools.partial[nn.Module]]:
    """The ResNets of all depths with each of these regulators, None for none, by name."""
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
    """The registered names that match a shell pattern, such as "*gru*"; other sizes are accepted by name too."""
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
    """A model's name and options, from text such as "regnet20_convlstm kernel=dense regulated_stages=(1, 2)".

    Values are Python literals, or words without quotes; whether the model takes them is create_model's to check.

    Raises:
      ValueError: the text is not written so, or an option is not one of OPTIONS or named twice.
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
                raise ValueError(f"{key}={value} is not understood: write it such as in {_EXAMPLE!r}") from None
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
      name: one of `list_models()`, or one of its families of another size: any CIFAR depth 6m+2, such as
        "regnet14_convlstm" and "preact_resnet56", 6m+4 of wide ones, "wrn16_4", "resnext50_16x8d", "wide_resnet50_4".
      num_classes: 0 gives pooled features.
      dtype: of the arithmetic, float32 or bfloat16; parameters, statistics and logits are float32.
      axis_name: the pmap or shard_map axis over which batch normalisation is synchronised.
      ops: the arithmetic. "plain" is JAX's own; "cpu" has gradients that are fast on a CPU and, where there is a C++
        compiler, the separable cells' steps as native operations, which run on CPUs only and which `jax.export`
        refuses; "gpu" has the separable ConvLSTM's step as Pallas kernels for a GPU, not yet measured on one, and slow
        elsewhere. Their results are equal up to rounding. "auto", or None, is "cpu" on CPUs and "plain" elsewhere. An
        `Ops` of your own is taken too.
        "cpu" and "gpu" have reverse rules of their own, so forward mode (`jax.jvp`, `jax.jacfwd`, `jax.linearize`)
        ends in a TypeError, and so do second derivatives by "gpu"; Hessian-vector products as `jax.jvp` of `jax.grad`
        and gradients of gradients work by "cpu". For all else give "plain".
      devices: those that will run the model, for what depends on their platform: "auto", and whether a stage's blocks
        are unrolled. None is JAX's default device.
      **options: kernel, share_regulator, regulator_grouping, normalize_state, share_state_norm, regulated_stages,
        shortcut, width, bottleneck_stride, init (RegNet's `initial`), fuse_init, unroll, remat, scan, features,
        output_stride and frozen_batch_stats; see RegNet. None leaves the default: the model's, and for unroll all
        blocks on a CPU, where a loop is somewhat slower, and 1 elsewhere.

    Returns:
      A Flax module; `model.init(key, images, train=False)` makes its variables, and `model.stage_info` tells the
      name, channels and stride of each feature.

    Raises:
      ValueError: unknown name (the closest are named), unknown option, or a value that an option cannot take.
    """
    model = check_model(name, num_classes, ops=ops, **options)
    platform = ops_lib.platform_of(devices)
    fields: dict[str, Any] = {"ops": ops_lib.choose(ops or "auto", platform)}
    if isinstance(model, RegNet) and model.unroll is None and platform != "cpu":
        fields["unroll"] = 1
    return model.clone(dtype=dtype, axis_name=axis_name, **fields)


def check_model(
    name: str, num_classes: int = 10, *, ops: str | ops_lib.Ops | None = "auto", **options: Any
) -> RegNet | RegNetY | RLANet:
    """The model of `create_model`, with its errors and without its devices: what depends on them is not decided."""
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
        raise ValueError(f"bottleneck_stride '3x3' is for ResNets: in {name}, X2 must have the size of H; use '1x1'")
    if fields.get("share_state_norm") and fields.get("normalize_state") == "none":
        raise ValueError("share_state_norm is True: with normalize_state 'none' there is nothing to share")
    if fields.get("replace") and fields.get("fuse_init") == "identity":
        raise ValueError(f"fuse_init is 'identity': {name} has H in the place of X and fuses nothing; leave it out")
    model: Any = make.func(**fields, num_classes=num_classes)
    wanted = chosen(model.features, model.stage_info)
    if not isinstance(model.features, bool):
        model = make.func(**fields | {"features": wanted}, num_classes=num_classes)
    return model
