"""Converts PyTorch state dicts to Flax variables and back, in numpy, with the names of the public projects."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from regnet_flax.models.families.rlanet import RLANet
from regnet_flax.models.layers import BatchNorm
from regnet_flax.models.regnet import RegNet, stack_blocks, unstack_blocks
from regnet_flax.models.regnety import RegNetY

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
IGNORED = "num_batches_tracked"
# A batch normalisation divides by √(variance + epsilon).
_IDENTITY_NORM = {"scale": 1.0, "bias": 0.0, "mean": 0.0, "var": 1.0 - BatchNorm.epsilon}


def _module_names(model: nn.Module) -> dict[str, str]:
    """Maps modules to their names in the model's PyTorch counterpart, where the names differ."""
    if isinstance(model, RegNetY):
        return _REGNETY
    if isinstance(model, RLANet):
        return _names("shortcut", "linear", "regulator")
    assert isinstance(model, RegNet)
    if model.replace:
        return _names("shortcut", "linear", "rnn") | {"conv": "conv_x"}
    if model.normalize_state == "none" and model.kernel == "dense" and not model.share_regulator:
        return _names("downsample", "fc", "convlstm")
    if model.stem == "imagenet" and model.regulator is None:
        return _names("downsample", "fc", "regulator")  # torchvision
    return _names("shortcut", "linear", "regulator")  # the paper's


def _names(shortcut: str, head: str, regulator: str) -> dict[str, str]:
    return {"shortcut_conv": f"{shortcut}.0", "shortcut_bn": f"{shortcut}.1", "head": head, "regulator": regulator}


_REGNETY = {"stem_conv": "stem.0", "stem_bn": "stem.1", "head": "fc", "proj_conv": "proj.0", "proj_bn": "proj.1"}
_REGNETY |= {f"{part}_{kind}": f"f.{part}.{i}" for part in "abc" for i, kind in enumerate(("conv", "bn"))}
_REGNETY |= {"se": "f.se"}


def _torch_name(path: tuple[str, ...], modules: dict[str, str]) -> str:
    """Maps ("stage1", "block2", "shortcut_conv", "kernel") to "layer1.1.shortcut.0.weight"."""
    parts = []
    *owners, leaf = path
    for index, owner in enumerate(owners):
        if match := re.fullmatch(r"stage(\d+)_block(\d+)", owner):  # RegNetY
            parts.append(f"trunk_output.block{match[1]}.block{match[1]}-{int(match[2]) - 1}")
        elif match := re.fullmatch(r"stage(\d+)", owner):
            of_a_block = owners[1].startswith("block")  # otherwise all blocks of the stage share it
            parts.append(f"layer{match[1]}" if of_a_block else f"{owners[1]}{match[1]}")
        elif match := re.fullmatch(r"block(\d+)", owner):
            parts.append(str(int(match[1]) - 1))
        elif index == 1 and re.fullmatch(r"stage\d+", owners[0]):
            continue  # shared by the stage, and already named
        else:
            parts.append(modules.get(owner, owner))
    return ".".join([*parts, _LEAVES.get(leaf, leaf)])


class StemError(ValueError):
    """The weights expect images with another number of channels; the message is one line."""


def _stem(model: nn.Module) -> str:
    return "stem.0.weight" if isinstance(model, RegNetY) else "conv1.weight"


def check_stem(state_dict: Mapping[str, np.ndarray], model: nn.Module, channels: int) -> None:
    """Raises StemError if the weights expect images with another number of channels."""
    name, stem = _stem(model), state_dict.get(_stem(model))
    if stem is not None and stem.ndim == 4 and stem.shape[1] != channels:
        wanted = (stem.shape[0], channels, *stem.shape[2:])
        raise StemError(
            f"{name} has shape {stem.shape}, for images of {stem.shape[1]} channels, not {wanted}, for {channels}"
        )


def adapt_stem(state_dict: Mapping[str, np.ndarray], model: nn.Module, channels: int) -> dict[str, np.ndarray]:
    """Adapts weights for colour images to grey ones, or the reverse; other weights stay unchanged.

    A grey image gives the result of three equal channels; a colour image gives the result of its channels' mean.
    """
    name, arrays = _stem(model), dict(state_dict)
    stem = arrays.get(name)
    if stem is None or stem.ndim != 4 or {stem.shape[1], channels} != {1, 3}:
        return arrays
    summed = stem.sum(1, keepdims=True)
    arrays[name] = summed if channels == 1 else np.repeat(summed / channels, channels, axis=1)
    return arrays


class _Entry(NamedTuple):
    """An array of per-block variables: PyTorch's name, the path starting with the collection, and the array."""

    name: str
    path: tuple[str, ...]
    array: Any

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Converts to PyTorch's layout: (height, width, inputs, outputs) to (outputs, inputs, height, width)."""
        if ".f.se." in self.name and array.ndim == 2:  # torchvision's RegNet uses 1×1 convolutions for dense layers
            return array.T[:, :, None, None]
        return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T

    def from_torch(self, array: np.ndarray) -> np.ndarray:
        """Inverts `to_torch`; an array that fits no layout stays unchanged."""
        if ".f.se." in self.name and array.ndim == 4:
            return array[:, :, 0, 0].T
        return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _entries(variables: Mapping[str, Any], model: nn.Module) -> Iterator[_Entry]:
    modules = _module_names(model)
    flat = traverse_util.flatten_dict(dict(variables))
    names = {path: _torch_name(path[1:], modules) for path in flat}
    count = collections.Counter(names.values())
    for path, array in flat.items():
        name = names[path]
        if count[name] > 1:  # such as a custom cell with weights "kernel" and "scale"
            name = f"{name.rpartition('.')[0]}.{path[-1]}"
        yield _Entry(name, path, array)


def to_torch(variables: Mapping[str, Any], model: nn.Module) -> dict[str, np.ndarray]:
    """Converts a model's variables to a PyTorch state dict.

    Args:
      variables: "params" and "batch_stats", stacked or per block; or only one of them, for gradients say.
      model: from create_model.

    Returns:
      Maps PyTorch's names to arrays in PyTorch's layouts.
    """
    variables = {name: variables[name] for name in ("params", "batch_stats") if name in variables}
    entries = _entries(unstack_blocks(variables), model)
    # ascontiguousarray would make a scalar a vector.
    return {entry.name: np.require(entry.to_torch(np.asarray(entry.array)), requirements="C") for entry in entries}


def from_torch(state_dict: Mapping[str, np.ndarray], model: nn.Module, *, new_head: bool = False) -> dict[str, Any]:
    """Converts a PyTorch state dict to the model's variables.

    Args:
      state_dict: maps PyTorch's names to arrays in PyTorch's layouts; `num_batches_tracked` is ignored.
      model: from create_model, with the state dict's number of classes.
      new_head: ignore the state dict's head, and return none; the number of classes may then differ.

    Returns:
      "params" and "batch_stats", stacked where the model runs its blocks under `nn.scan`.

    Raises:
      ValueError: entries are missing, left over or have another shape; the message lists them.
    """
    found = {name: np.asarray(array) for name, array in state_dict.items() if not name.endswith(IGNORED)}
    if _module_names(model)["head"] == "linear" and "linear.weight" not in found:
        # A public notebook names the head this way.
        found = {name.replace("fc.", "linear.") if name.startswith("fc.") else name: a for name, a in found.items()}
    per_block = model.clone(scan=False) if hasattr(model, "scan") else model
    stem = found.get(_stem(model))
    channels = stem.shape[1] if stem is not None and stem.ndim == 4 else 3
    images = jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32)
    expected = jax.eval_shape(lambda key, x: per_block.init(key, x, train=False), jax.random.key(0), images)

    flat, missing, misshapen = {}, [], []
    head = _module_names(model)["head"]
    if new_head:
        found = {name: array for name, array in found.items() if not name.startswith(f"{head}.")}
    for entry in _entries(expected, model):
        if new_head and entry.path[1] == "head":
            continue
        if entry.name not in found:
            missing.append(entry.name)
            continue
        array = found.pop(entry.name)
        wanted = entry.to_torch(np.empty(entry.array.shape, np.bool_)).shape
        if array.shape != wanted:
            misshapen.append(f"{entry.name} has shape {array.shape}, not {wanted}")
        else:
            flat[entry.path] = entry.from_torch(array)
    problems = [
        f"{what}: {', '.join(names)}"
        for what, names in (("missing", missing), ("left over", sorted(found)), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise ValueError("the state dict does not fit the model; " + "; ".join(problems))
    variables = traverse_util.unflatten_dict(flat)
    return stack_blocks(variables) if getattr(model, "scan", False) else variables


def bottleneck_stride(model: nn.Module) -> str:
    """Returns which convolution of a bottleneck has the stride, "1x1" or "3x3"; "" without bottlenecks."""
    bottlenecks = isinstance(model, RLANet) or (isinstance(model, RegNet) and model.block.endswith("bottleneck"))
    return model.bottleneck_stride if bottlenecks else ""  # pyright: ignore[reportAttributeAccessIssue]


def starts_from_plain(state_dict: Mapping[str, np.ndarray], model: nn.Module) -> bool:
    """Whether the model fuses X with a regulator's H, and the state dict comes from a network without regulators."""
    if not isinstance(model, RegNet) or model.regulator in (None, "dia") or model.replace:
        return False
    # A block of one's own may use H without a fusing convolution.
    regulated = any("conv_fuse" in name or "regulator" in name for name in state_dict)
    return model.regulated_stages != () and not regulated


def from_plain_torch(state_dict: Mapping[str, np.ndarray], model: RegNet, *, new_head: bool = False) -> dict[str, Any]:
    """Converts the state dict of a plain network to initial variables of the network with regulators.

    The convolutions that fuse X with H start as [identity, 0] and their batch normalisations as the identity, so in
    evaluation the network starts as the plain one.

    Args:
      state_dict: of `model.clone(regulator=None)`, with its names; see from_torch.
      model: see `starts_from_plain`.
      new_head: see from_torch.

    Returns:
      "params" and "batch_stats", without the regulators and the batch normalisations of their states.

    Raises:
      ValueError: see from_torch.
    """
    variables = from_torch(state_dict, model.clone(regulator=None), new_head=new_head)
    flat: dict[Any, Any] = traverse_util.flatten_dict(variables)
    images = jax.ShapeDtypeStruct((1, 32, 32, variables["params"]["conv1"]["kernel"].shape[2]), jnp.float32)
    expected = jax.eval_shape(lambda key, x: model.init(key, x, train=False), jax.random.key(0), images)
    shapes: dict[Any, Any] = traverse_util.flatten_dict(expected)
    for path, array in shapes.items():
        if "conv_fuse" in path:
            flat[path] = np.broadcast_to(np.eye(*array.shape[-2:], dtype=np.float32), array.shape)
        elif "bn_fuse" in path:
            flat[path] = np.full(array.shape, _IDENTITY_NORM[path[-1]], np.float32)
    return traverse_util.unflatten_dict(flat)
