"""XLA's flags that make a CPU faster, by version of jaxlib."""

from __future__ import annotations

import importlib.metadata
import os

# Convolutions by Eigen instead of YNNPACK: benchmarks/README.md has what it brings. jaxlib 0.12 is better without, and
# a flag that a version does not know ends the process, so that only versions that were measured are named.
_FLAGS = {"0.10.2": "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_REDUCE"}


def set_defaults() -> None:
    """Puts this jaxlib's flag into XLA_FLAGS, before JAX computes anything.

    Not where XLA_FLAGS has another value of it, nor where JAX_PLATFORMS leaves CPUs out.
    """
    flag = _FLAGS.get(importlib.metadata.version("jaxlib"), "")
    given, platforms = os.environ.get("XLA_FLAGS", ""), os.environ.get("JAX_PLATFORMS", "") or "cpu"
    if flag and "cpu" in platforms and flag.partition("=")[0] not in given:
        os.environ["XLA_FLAGS"] = f"{flag} {given}".strip()
