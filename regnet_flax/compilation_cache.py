"""Compiled programs are kept between runs, by JAX's persistent compilation cache in the user's cache directory."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import platform

import platformdirs

MAX_BYTES = 1 << 30  # the programs that were used longest ago go first


def set_defaults() -> None:
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
