"""What the program sets of XLA before JAX starts: flags that make a CPU faster, and a place for compiled programs."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import pathlib
import platform

import platformdirs

# Convolutions by Eigen instead of YNNPACK: benchmarks/README.md has what it brings. jaxlib 0.12 is better without, and
# a flag that a version does not know ends the process, so that only versions that were measured are named.
_FLAGS = {"0.10.2": "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_REDUCE"}

MAX_BYTES = 1 << 30  # the programs that were used longest ago go first


def set_defaults() -> None:
    """Puts this jaxlib's flag into XLA_FLAGS, before JAX computes anything.

    Not where XLA_FLAGS has another value of it, nor where JAX_PLATFORMS leaves CPUs out.
    """
    flag = _FLAGS.get(importlib.metadata.version("jaxlib"), "")
    given, platforms = os.environ.get("XLA_FLAGS", ""), os.environ.get("JAX_PLATFORMS", "") or "cpu"
    if flag and "cpu" in platforms and flag.partition("=")[0] not in given:
        os.environ["XLA_FLAGS"] = f"{flag} {given}".strip()


def keep_compiled() -> None:
    """Turns the cache on, before JAX is imported, by environment variables, which child processes see too.

    JAX's own variables come first: JAX_ENABLE_COMPILATION_CACHE=false turns the cache off, and
    JAX_COMPILATION_CACHE_DIR, JAX_COMPILATION_CACHE_MAX_SIZE and JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS change it.
    Where the directory cannot be made, there is no cache.
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
    # JAX's keys leave out what instructions a CPU has: a home directory may be that of many machines.
    parts = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):  # Linux alone has the file
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        parts += sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
