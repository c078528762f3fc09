"""Files of weights, .pth and .safetensors, as {name: array} and back.

They may come from strangers: nothing is unpickled but by PyTorch's own restricted reader.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from regnet_flax.errors import WeightsError
from regnet_flax.files import replacing, write_json

SUFFIXES = {".safetensors": "safetensors", ".pth": "torch", ".pt": "torch"}
# Under which a training script's checkpoint holds the weights, and before which a parallel wrapper puts its name.
_NESTED, _PREFIX = ("state_dict", "model_state_dict", "model", "net"), "module."


def _import_torch(path: pathlib.Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise WeightsError(f"{path} needs PyTorch: pip install torch, or use a .safetensors file") from error
    return torch


def _check_suffix(path: pathlib.Path) -> str:
    if path.suffix not in SUFFIXES:
        raise WeightsError(f"{path} must end in {', '.join(SUFFIXES)}")
    return SUFFIXES[path.suffix]


def read_weights(file: str | pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads a file of weights.

    Args:
      file: a .safetensors file, or a .pth or .pt file that `torch.load(weights_only=True)` can read, of a state dict or
        of a training script's checkpoint that holds one.

    Returns:
      From names to arrays, float32 but for integers; and the metadata that write_weights gave it, {} for others.

    Raises:
      WeightsError: there is no such file, it is damaged, or what reads it is not installed.
    """
    path = pathlib.Path(file)
    kind = _check_suffix(path)
    if not path.is_file():
        raise WeightsError(f"{path} is not a file: name a file of weights")
    metadata: dict[str, str] = {}
    if kind == "safetensors":
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError as error:
            raise WeightsError(f"{path} needs the package safetensors: pip install safetensors") from error
        try:
            with safe_open(path, "numpy") as opened:
                metadata = opened.metadata() or {}
                found = {name: opened.get_tensor(name) for name in opened.keys()}
        except (SafetensorError, OSError, TypeError) as error:
            raise WeightsError(f"{path} is no whole .safetensors file: {str(error).splitlines()[0]}") from error
    else:
        torch = _import_torch(path)
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # zip, pickle and storage errors of any kind, on a file that may be anything
            reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
            raise WeightsError(f"{path} cannot be read as weights alone: {reason}") from error
        loaded = next((loaded[name] for name in _NESTED if _is_nested(loaded, name)), loaded)
        if not isinstance(loaded, Mapping) or not all(torch.is_tensor(value) for value in loaded.values()):
            raise WeightsError(f"{path} holds no state dict: save model.state_dict() with torch.save")
        found = {name: (t.float() if t.is_floating_point() else t).numpy() for name, t in loaded.items()}
        metadata = _read_beside(path)
    found = {n: a.astype(np.float32) if np.issubdtype(a.dtype, np.floating) else a for n, a in found.items()}
    if found and all(name.startswith(_PREFIX) for name in found):
        found = {name.removeprefix(_PREFIX): array for name, array in found.items()}
    return found, metadata


def _beside(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + ".json")


def _read_beside(path: pathlib.Path) -> dict[str, str]:
    try:
        found = json.loads(_beside(path).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_nested(loaded: Any, name: str) -> bool:
    return isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping)


def write_weights(
    file: str | pathlib.Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a file of weights, whole or not at all.

    Args:
      file: a .safetensors, .pth or .pt file; its directory is made.
      arrays: from names to arrays.
      metadata: kept in a .safetensors file; as FILE.json beside a .pth file, which has no place for it.

    Raises:
      WeightsError: another suffix, or what writes it is not installed.
    """
    path = pathlib.Path(file)
    kind = _check_suffix(path)
    with replacing(path) as part:
        if kind == "safetensors":
            from safetensors.numpy import save_file

            texts = dict(metadata or {})
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, part, texts)
        else:
            torch = _import_torch(path)
            torch.save({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}, part)
            if metadata:
                write_json(_beside(path), dict(metadata))
