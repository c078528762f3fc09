"""What a function with derivatives of its own needs under `jax.shard_map`."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax


def vary_together(*arrays: Any) -> tuple[Any, ...]:
    """Under `jax.shard_map`, marks each array as varying over every mesh axis over which one of them varies.

    A weight that all devices hold alike then gets the sum of the devices' gradients, by the transpose of the mark,
    and the backward rule between need not know about devices. Elsewhere nothing changes.
    """
    axes = [jax.typeof(a).manual_axis_type.varying for a in arrays]
    every = frozenset().union(*axes)
    return tuple(
        a if own == every else lax.pcast(a, tuple(sorted(every - own)), to="varying")
        for a, own in zip(arrays, axes, strict=True)
    )
