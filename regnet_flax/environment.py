"""The machine and the versions that produced a result."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
import shlex
import sys
from collections.abc import Mapping
from typing import Any

import jax

from regnet_flax.files import processor_facts
from regnet_flax.models import ops
from regnet_flax.models.ops import native_library


def environment(devices: list[Any], choice: str = "auto") -> dict[str, Any]:
    """Returns hardware and versions, for results.json.

    Args:
      devices: the run's devices.
      choice: the model's option `ops`. It tells whether the run has native operations, which are built if need be.
    """
    native = ops.choose(choice, ops.kind_of(devices)) is ops.CPU
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "regnet-flax")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    script = pathlib.Path(sys.argv[0])
    program = ("python", "-m", "regnet_flax.main") if script.name == "main.py" else ("python", script.name)
    return {
        "hardware": {
            "platform": devices[0].platform,
            "device": devices[0].device_kind,
            "devices": len(devices),
            "processes": jax.process_count(),
            "native_operations": native and native_library.available(),
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
            "cpu": processor(),
            "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        },
        "versions": versions,
        "command": shlex.join([*program, *sys.argv[1:]]),
    }


def describe_hardware(hardware: Mapping[str, Any]) -> str:
    """Returns "hardware" of results.json in words, such as "2 CPU cores" or "8 × NVIDIA A100, 96 CPU cores"."""
    device = [] if hardware["platform"] == "cpu" else [f"{hardware['devices']} × {hardware['device']}"]
    cores = f"{hardware['cpu_cores']} CPU core{'s' * (hardware['cpu_cores'] > 1)}"
    return ", ".join([*device, cores] + [f"{hardware['processes']} hosts"] * (hardware["processes"] > 1))


def processor() -> str:
    """Returns the processor's name as the system reports it, or else its architecture."""
    return processor_facts().get("model name") or platform.processor() or platform.machine()
