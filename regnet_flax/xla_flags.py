"""Sets up XLA before JAX starts: flags that speed up CPUs, and a cache for compiled programs."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import pathlib
import platform

import platformdirs

# Convolutions by Eigen instead of YNNPACK: benchmarks/README.md has the gain. jaxlib 0.12 is faster without it. An
# unknown flag ends the process, so only versions that were measured appear here.
_FLAGS = {"0.10.2": "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_REDUCE"}

MAX_BYTES = 1 << 30  # the least recently used programs go first


def set_defaults() -> None:
    """Adds this jaxlib's flag to XLA_FLAGS, before JAX computes anything.

    It does nothing if XLA_FLAGS already sets that flag, or if JAX_PLATFORMS excludes CPUs.
    """
    flag = _FLAGS.get(importlib.metadata.version("jaxlib"), "")
    given, platforms = os.environ.get("XLA_FLAGS", ""), os.environ.get("JAX_PLATFORMS", "") or "cpu"
    if flag and "cpu" in platforms and flag.partition("=")[0] not in given:
        os.environ["XLA_FLAGS"] = f"{flag} {given}".strip()


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
    parts = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):  # only Linux has the file
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        parts += sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
