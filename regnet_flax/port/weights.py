"""Reads and writes files of weights, .pth and .safetensors, as {name: array}.

The files may come from strangers: only PyTorch's own restricted reader unpickles anything.
"""

from __future__ import annotations

import contextlib
import json
import logging
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from regnet_flax.errors import WeightsError, printable
from regnet_flax.files import replacing, write_json
from regnet_flax.places import fetch
from regnet_flax.port import shipped

# Suffixes of file names; exports use PyTorch's first one.
SUFFIXES = {".safetensors": "safetensors"} | dict.fromkeys((".pth", ".pt", ".pth.tar", ".ckpt", ".bin"), "torch")
# The keys under which a training script's checkpoint holds the weights: first the averages, which it evaluates.
_NESTED = ("state_dict_ema", "model_ema", "ema_state_dict", "state_dict", "model_state_dict", "model", "net")
# Text that wrappers add before each name (data parallel and averaged models, PyTorch Lightning) or in it
# (torch.compile).
_PREFIXES, _COMPILED = ("module.", "model.", "net."), "_orig_mod."
_BESIDE_AVERAGES = "n_averaged"

logger = logging.getLogger("regnet_flax")


def _import_torch(path: pathlib.Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise WeightsError(f"{path} needs PyTorch: pip install torch, or use a .safetensors file") from error
    return torch


def _check_suffix(path: pathlib.Path, otherwise: str = "") -> str:
    kind = next((kind for suffix, kind in SUFFIXES.items() if path.name.endswith(suffix)), None)
    if kind is None:
        raise WeightsError(f"{path} must end in {', '.join(SUFFIXES)}{otherwise}")
    return kind


def read_weights(file: str | pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads a file of weights.

    Args:
      file: local or in a bucket; a .safetensors file, or a PyTorch file that `torch.load(weights_only=True)` can read:
        a state dict, or a training script's checkpoint that holds one. Averaged weights take precedence. Or one of
        `shipped.list_weights`.

    Returns:
      Maps names to arrays, float32 except for integers, without the text that wrappers add to the names; and the
      metadata that write_weights stored, {} for other files. Ignored and renamed entries are logged.

    Raises:
      WeightsError: there is no such file, it is damaged, or the library that reads it is not installed.
    """
    file = shipped.find(file) or file
    kind = _check_suffix(pathlib.Path(file), shipped.alternatives("be"))
    path = fetch(file)
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
                found = {name: np.asarray(opened.get_tensor(name)) for name in opened.keys()}
        except (SafetensorError, OSError, TypeError) as error:
            raise WeightsError(f"{path} is not a complete .safetensors file: {str(error).splitlines()[0]}") from error
    else:
        torch = _import_torch(path)
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # the file may be anything, so zip, pickle and storage errors of any kind
            raise WeightsError(_unreadable(path, error, torch)) from error
        nests = [name for name in _NESTED if _is_nested(loaded, name)]
        if nests:
            others = f", not {', '.join(nests[1:])}" if len(nests) > 1 else ""
            logger.info("%s: the weights of %s%s", path, nests[0], others)
            loaded = loaded[nests[0]]
        if not isinstance(loaded, Mapping) or not all(torch.is_tensor(value) for value in loaded.values()):
            raise WeightsError(f"{path} holds no state dict: save model.state_dict() with torch.save")
        found = {name: (t.float() if t.is_floating_point() else t).numpy() for name, t in loaded.items()}
        metadata = _read_beside(path)
    # NumPy does not treat bfloat16 and the 8-bit types as floating.
    found = {n: a.astype(np.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a for n, a in found.items()}
    return _unwrapped(found, path), metadata


def _unwrapped(found: dict[str, np.ndarray], path: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the arrays with the model's own names."""
    arrays = {name: array for name, array in found.items() if name != _BESIDE_AVERAGES}
    removed = [_BESIDE_AVERAGES] if len(arrays) < len(found) else []
    if any(_COMPILED in name for name in arrays):
        arrays = {name.replace(_COMPILED, ""): array for name, array in arrays.items()}
        removed.append(_COMPILED)
    while arrays and (prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in arrays)), "")):
        arrays = {name.removeprefix(prefix): array for name, array in arrays.items()}
        removed.append(prefix)
    if removed:
        logger.info("%s: without %s in the names", path, ", ".join(removed))
    return arrays


def _unreadable(path: pathlib.Path, error: Exception, torch: Any) -> str:
    """Explains in one line why a PyTorch file cannot be read without running code."""
    found = {match[1] for match in re.finditer(r"GLOBAL ([\w.]+)", str(error))}
    with contextlib.suppress(Exception):  # it may not be an archive at all
        found.update(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    if found:
        return (
            f"{path} cannot be read as weights only: it also holds {', '.join(sorted(found))}, and reading that may "
            "run code. If you trust the file, save its weights by themselves: "
            f"torch.save(torch.load({path.name!r}, weights_only=False)['state_dict'], 'weights.pth')"
        )
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return printable(f"{path} cannot be read as weights only: {lines[0][:120] if lines else type(error).__name__}")


def _beside(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + ".json")


def _read_beside(path: pathlib.Path) -> dict[str, str]:
    try:
        found = json.loads(_beside(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: text for name, text in found.items() if isinstance(text, str)} if isinstance(found, dict) else {}


def _is_nested(loaded: Any, name: str) -> bool:
    return isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping)


def write_weights(
    file: str | pathlib.Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a file of weights atomically.

    Args:
      file: its name ends in one of SUFFIXES; its directory is created if needed.
      arrays: maps names to arrays.
      metadata: stored inside a .safetensors file, or as FILE.json beside a PyTorch file, which cannot hold it.

    Raises:
      WeightsError: the suffix is unknown, or the library that writes it is not installed.
    """
    path = pathlib.Path(file)
    kind = _check_suffix(path)
    with replacing(path) as part:
        if kind == "safetensors":
            from safetensors.numpy import save_file

            texts = dict(metadata or {})
            save_file({name: np.require(array, requirements="C") for name, array in arrays.items()}, part, texts)
        else:
            torch = _import_torch(path)
            torch.save({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}, part)
            if metadata:
                write_json(_beside(path), dict(metadata))
