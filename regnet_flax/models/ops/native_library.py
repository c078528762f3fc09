"""The library of native operations: built when it is first needed, kept in the user's cache, registered with XLA.

It is built then, and not when the package is installed, because its headers come with jaxlib: so a wheel stays pure
Python, installing needs neither a compiler nor jaxlib, and an editable installation does the same. Its file's
name depends on the processor's instructions, so machines may share a cache. Without a compiler the operations are off,
which is logged once, and the arithmetic is JAX's. A run's results.json says whether its model has them.

The environment: REGNET_FLAX_NATIVE=0 turns it off; CXX names the compiler, CXXFLAGS more of its flags.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.ffi
import jax.numpy as jnp
import jaxlib.version
import platformdirs

from regnet_flax.files import processor_facts
from regnet_flax.models.ops.varying import vary_together

logger = logging.getLogger("regnet_flax")

SOURCES = pathlib.Path(__file__).parent / "cpp"
TARGETS = [f"regnet_flax_{cell}_{way}" for cell in ("rnn", "gru", "lstm") for way in ("forward", "backward")]
TARGETS += [
    f"regnet_flax_{name}" for name in ("convolution", "input_gradient", "filter_gradient", "convolution_gradients")
]
TARGETS += [f"regnet_flax_{name}" for name in ("moments", "norm_gradient_sums", "norm_gradient")]
# NaN and infinities are kept. Products and sums are contracted, which -std=c++17 alone would turn off.
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread", "-DNDEBUG", "-w"]
# After the user's: sigmoid and tanh would be wrong if sums were reordered.
EXACT = ["-fno-fast-math", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
DTYPES = (jnp.float32, jnp.bfloat16)  # of the images
TIME_LIMIT = 120  # seconds
_LOCK = threading.Lock()  # a run traces its programs in threads


class _OffError(Exception):
    """Why there is no library."""


def available() -> bool:
    """Whether the native operations are registered with XLA; the first call builds the library if there is none.

    If they are not, the reason is logged once. It raises nothing, and threads may call it at the same time.
    """
    with _LOCK:
        return _registered()


def prepare() -> None:
    """Starts building the library in a thread if JAX computes on a CPU; `available` waits for it."""
    if jax.default_backend() == "cpu":
        threading.Thread(target=available, daemon=True).start()


@functools.cache
def _registered() -> bool:
    try:
        path = _library()
        _register(path)
    except (_OffError, OSError, AttributeError, RuntimeError, ValueError) as error:
        logger.info("native operations are off: %s", error)
        return False
    logger.debug("native operations: %s", path)
    return True


def _register(path: pathlib.Path) -> None:
    try:
        library = ctypes.CDLL(str(path))
    except OSError:
        path.unlink(missing_ok=True)  # it is damaged; the next run builds it again
        raise
    if not library.regnet_flax_supported():
        raise _OffError("this processor has no AVX2")
    for target in TARGETS:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")


def _library() -> pathlib.Path:
    """The library's file, built if there is none."""
    if os.environ.get("REGNET_FLAX_NATIVE", "") == "0":
        raise _OffError("REGNET_FLAX_NATIVE is 0")
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    flags = [*FLAGS, *_instructions(), *shlex.split(os.environ.get("CXXFLAGS", "")), *EXACT]
    parts = [path.read_text(encoding="utf-8") for path in sorted(SOURCES.rglob("*")) if path.is_file()]
    parts += [*compiler, *flags, jaxlib.version.__version__, platform.system(), platform.machine()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    path = cache_directory() / f"{key}.so"
    if not path.exists():
        if not shutil.which(compiler[0]):
            raise _OffError(f"there is no C++ compiler {compiler[0]!r}: install one, or name it in CXX")
        _build([*compiler, *flags, "-I", jax.ffi.include_dir(), str(SOURCES / "calls.cc")], path)
    return path


def _instructions() -> list[str]:
    """Returns flags that leave out the code for other processors, which halves the build time."""
    words = set(processor_facts().get("flags", "").split())
    if words >= {"avx512f", "avx512bw", "avx512dq", "avx512vl"}:
        return ["-DONLY_AVX512"]
    return ["-DONLY_AVX2"] if "avx2" in words else []


def cache_directory() -> pathlib.Path:
    """Where libraries are kept.

    Raises:
      RuntimeError: there is no home directory.
    """
    return platformdirs.user_cache_path("regnet_flax") / "native"


def _build(command: list[str], path: pathlib.Path) -> None:
    """Compiles into a temporary file, then renames it: processes that build at the same time do not collide."""
    start = time.monotonic()
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob("tmp*.so"):  # by a process that ended while it was building
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > 2 * TIME_LIMIT:
                    left.unlink()
        number, part = tempfile.mkstemp(suffix=".so", dir=path.parent)
        os.close(number)
        done = subprocess.run(
            [*command, "-o", part], capture_output=True, text=True, errors="replace", timeout=TIME_LIMIT
        )
        if done.returncode:
            said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
            raise _OffError(f"{command[0]} failed: {said}")
        os.replace(part, path)
    except subprocess.TimeoutExpired:
        raise _OffError(f"{command[0]} took more than {TIME_LIMIT} s") from None
    except OSError as error:
        raise _OffError(f"they cannot be built in {path.parent}: {error}") from error
    finally:
        if part:
            with contextlib.suppress(OSError):
                os.unlink(part)
    logger.info("native operations: built by %s in %.1f s", command[0], time.monotonic() - start)


def derivable(reference: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a function of one static argument and arrays the derivatives of `reference`, which has the same values."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        derivable = jax.custom_jvp(function, nondiff_argnums=(0,))

        @derivable.defjvp
        def _(form, primals, tangents):
            return derivable(form, *primals), jax.jvp(functools.partial(reference, form), primals, tangents)[1]

        return derivable

    return decorate


def call(target: str, results: Any, *arrays: Any, **attributes: Any) -> Any:
    """Calls a native operation with the leaves of `arrays`; `results` are types, such as `jax.typeof` gives."""
    return jax.ffi.ffi_call(target, results, vmap_method="broadcast_all")(
        *vary_together(*jax.tree.leaves(arrays)), **attributes
    )
