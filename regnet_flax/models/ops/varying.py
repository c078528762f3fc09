"""What a function with derivatives or an operation of its own needs on several devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec


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


def divided(array: Any) -> bool:
    """Whether a mesh with explicit axes, as `jax.make_mesh` makes it, divides an array."""
    return any(axis is not None for axis in jax.typeof(array).sharding.spec)


def undivided(like: Any, shape: tuple[int, ...]) -> Any:
    """The type of a float32 array computed from `like`, of its own shape. No mesh divides it, unlike `like`."""
    kind = jax.typeof(like)
    whole = kind.sharding.update(spec=PartitionSpec(*[None] * len(shape)))
    return kind.update(shape=shape, dtype=jnp.dtype(jnp.float32), sharding=whole)
