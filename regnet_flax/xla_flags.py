"""Sets up XLA before JAX starts: flags that speed up CPUs, and a cache for compiled programs."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import platform

import platformdirs

from regnet_flax.files import processor_facts

# Convolutions by Eigen instead of YNNPACK: benchmarks/README.md has the gain. jaxlib 0.12 is faster without it. An
# unknown flag ends the process, so only versions that were measured appear here.
_FLAGS = {"0.10.2": "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_REDUCE"}
# Compiles a quarter faster, to steps that are as fast; see benchmarks/README.md. It would hold for other devices, too,
# where it was not measured.
_ON_CPUS_ONLY = "--xla_backend_optimization_level=1"
# For each jaxlib, how a CPU compiles quickest; with an unknown option it does not compile at all.
_QUICKEST = {"0.10.2": {"xla_cpu_use_fusion_emitters": False}}

MAX_BYTES = 1 << 30  # the least recently used programs go first


def set_defaults() -> None:
    """Adds flags to XLA_FLAGS, before JAX computes anything, except those that XLA_FLAGS already sets.

    It does nothing if JAX_PLATFORMS excludes CPUs.
    """
    given, platforms = os.environ.get("XLA_FLAGS", ""), os.environ.get("JAX_PLATFORMS", "")
    if "cpu" not in (platforms or "cpu"):
        return
    flags = [_FLAGS.get(importlib.metadata.version("jaxlib"), "")]
    if platforms == "cpu" or not _has_accelerator():
        flags.append(_ON_CPUS_ONLY)
    new = [flag for flag in flags if flag and flag.partition("=")[0] not in given]
    if new:
        os.environ["XLA_FLAGS"] = " ".join([*new, given]).strip()


def compile_quickly() -> dict[str, bool | int]:
    """Returns the options of `jax.jit` for a program that runs once, on a CPU, in less time than it compiles."""
    return {"xla_backend_optimization_level": 0} | _QUICKEST.get(importlib.metadata.version("jaxlib"), {})


def _has_accelerator() -> bool:
    """Whether JAX may find another device than CPUs: its plugins are installed."""
    return any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))


def keep_compiled() -> None:
    """Turns on the compilation cache before JAX is imported, by environment variables, which child processes inherit.

    JAX's own variables take precedence: JAX_ENABLE_COMPILATION_CACHE=false turns the cache off, and
    JAX_COMPILATION_CACHE_DIR, JAX_COMPILATION_CACHE_MAX_SIZE and JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS change it.
    If the directory cannot be made, there is no cache.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home directory
        directory = platformdirs.user_cache_path("regnet_flax") / "compiled" / _processor_hash()
        directory.mkdir(parents=True, exist_ok=True)
        if os.access(directory, os.W_OK):
            os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory)
            os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(MAX_BYTES))
            os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def _processor_hash() -> str:
    # JAX's cache keys ignore the CPU's instruction set, and several machines may share a home directory.
    facts = processor_facts()
    parts = [platform.machine(), platform.processor()]
    parts += [facts.get(name, "") for name in ("model name", "flags", "Features")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
