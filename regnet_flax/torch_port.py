"""PyTorch state dicts to Flax variables and back, in numpy, by the public projects' and torchvision's names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from regnet_flax.models.regnet import RegNet, stack_blocks, unstack_blocks

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_IGNORED = "num_batches_tracked"


def _is_torchvision(model: nn.Module) -> bool:
    """Whether the model's names are torchvision's: those of the ImageNet ResNets without regulators."""
    return isinstance(model, RegNet) and model.stem == "imagenet" and model.regulator is None


def _torch_name(path: tuple[str, ...], torchvision: bool) -> str:
    """From ("stage1", "block2", "shortcut_conv", "kernel") to "layer1.1.shortcut.0.weight"."""
    shortcut = "downsample" if torchvision else "shortcut"
    modules = {
        "shortcut_conv": f"{shortcut}.0",
        "shortcut_bn": f"{shortcut}.1",
        "head": "fc" if torchvision else "linear",
    }
    parts = []
    *owners, leaf = path
    for owner in owners:
        if owner.startswith("stage"):
            stage = owner.removeprefix("stage")
            parts.append(f"regulator{stage}" if owners[1] == "regulator" else f"layer{stage}")
        elif owner.startswith("block"):
            parts.append(str(int(owner.removeprefix("block")) - 1))
        elif owner == "regulator" and owners[1] == "regulator":
            continue  # the stage's shared one, already named
        else:
            parts.append(modules.get(owner, owner))
    return ".".join([*parts, _LEAVES[leaf]])


def _entries(variables: Mapping[str, Any], model: nn.Module) -> Iterator[tuple[str, tuple[str, ...], Any]]:
    """(PyTorch's name, path with the collection first, array) of every array of per-block variables."""
    torchvision = _is_torchvision(model)
    for path, array in traverse_util.flatten_dict(dict(variables)).items():
        yield _torch_name(path[1:], torchvision), path, array


def _transposed(array: np.ndarray, to_torch: bool) -> np.ndarray:
    if array.ndim == 4:  # (height, width, inputs, outputs) against (outputs, inputs, height, width)
        return array.transpose((3, 2, 0, 1) if to_torch else (2, 3, 1, 0))
    return array.T if array.ndim == 2 else array


def to_torch(variables: Mapping[str, Any], model: nn.Module) -> dict[str, np.ndarray]:
    """A model's variables as a PyTorch state dict.

    Args:
      variables: "params" and "batch_stats", stacked or per block; or either one, as of gradients.
      model: from create_model.

    Returns:
      From PyTorch's names to arrays in PyTorch's layouts.
    """
    variables = {name: variables[name] for name in ("params", "batch_stats") if name in variables}
    entries = _entries(unstack_blocks(variables), model)
    return {name: np.ascontiguousarray(_transposed(np.asarray(array), True)) for name, _, array in entries}


def from_torch(state_dict: Mapping[str, np.ndarray], model: nn.Module) -> dict[str, Any]:
    """A PyTorch state dict as the model's variables.

    Args:
      state_dict: from PyTorch's names to arrays, in PyTorch's layouts; `num_batches_tracked` is ignored.
      model: from create_model, with the number of classes of the state dict.

    Returns:
      "params" and "batch_stats", stacked where the model runs its blocks under `nn.scan`.

    Raises:
      ValueError: entries are missing, left over or of another shape; the message lists them.
    """
    found = {name: np.asarray(array) for name, array in state_dict.items() if not name.endswith(_IGNORED)}
    if not _is_torchvision(model) and "linear.weight" not in found:
        # The public photo notebook's name for the head.
        found = {name.replace("fc.", "linear.") if name.startswith("fc.") else name: a for name, a in found.items()}
    per_block = model.clone(scan=False) if hasattr(model, "scan") else model
    stem = found.get("conv1.weight")
    channels = stem.shape[1] if stem is not None and stem.ndim == 4 else 3
    images = jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32)
    expected = jax.eval_shape(lambda key, x: per_block.init(key, x, train=False), jax.random.key(0), images)

    flat, missing, misshapen = {}, [], []
    for name, path, struct in _entries(expected, model):
        if name not in found:
            missing.append(name)
            continue
        array = _transposed(found.pop(name), False)
        if array.shape != struct.shape:
            wanted = _transposed(np.empty(struct.shape, np.bool_), True).shape
            misshapen.append(f"{name} has shape {_transposed(array, True).shape}, not {wanted}")
        flat[path] = array
    problems = [
        f"{what}: {', '.join(names)}"
        for what, names in (("missing", missing), ("left over", sorted(found)), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise ValueError("the state dict does not fit the model; " + "; ".join(problems))
    variables = traverse_util.unflatten_dict(flat)
    return stack_blocks(variables) if getattr(model, "scan", False) else variables
