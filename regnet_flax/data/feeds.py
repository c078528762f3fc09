"""Batches of a data set that lies on the device as uint8 arrays.

Batch k of an epoch is a pure function of (seed, epoch, k): only the step needs saving to resume, and no host work
happens between steps. Every function here runs inside the compiled step but `epoch_order`, once an epoch.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

Array = jax.Array
Batch = dict[str, Array]


@functools.partial(jax.jit, static_argnames="size")
def epoch_order(seed: Array | int, epoch: Array | int, size: int) -> Array:
    """The order in which an epoch goes through `size` examples: int32 (size,)."""
    return jax.random.permutation(jax.random.fold_in(jax.random.key(seed), epoch), size)


def train_batch(
    data: Batch,
    order: Array,
    seed: Array | int,
    step: Array,
    *,
    batch_size: int,
    shard: Array | int = 0,
    shards: int = 1,
    parts: int = 1,
) -> tuple[Batch, Array]:
    """One device's part of the batch of a step.

    The examples beyond the last whole batch of an epoch, others in each epoch, are left out.

    Args:
      data: "images", uint8 (size, height, width, channels), and "labels", int32 (size,).
      order: `epoch_order` of the epoch that `step` is in.
      seed: of the run.
      step: steps taken so far, of the whole run.
      batch_size: over all shards; a multiple of `shards`.
      shard: which of the `shards` equal parts.
      parts: of the batch, of each of which every shard has its share, one part's examples after another's; so that
        these parts are the same for any number of shards.

    Returns:
      "images" and "labels" of batch_size / shards examples, and their augmentation keys, each fixed by (seed, epoch,
      example).
    """
    epoch, k = jnp.divmod(step, order.shape[0] // batch_size)
    indices = jax.lax.dynamic_slice(order, (k * batch_size,), (batch_size,))
    indices = indices.reshape(parts, shards, -1)[:, shard].reshape(-1)
    return {name: array[indices] for name, array in data.items()}, example_keys(seed, epoch, indices)


def example_keys(seed: Array | int, epoch: Array | int, indices: Array) -> Array:
    """The augmentation keys of examples (N,): random keys (N,), each fixed by (seed, epoch, example)."""
    # One more folding, since epoch_order has used the epoch's own key up.
    epoch_key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), epoch), 1)
    return jax.vmap(jax.random.fold_in, (None, 0))(epoch_key, indices)


def eval_batch(data: Batch, start: Array, *, batch_size: int, shard: Array | int = 0, shards: int = 1) -> Batch:
    """One device's part of the batch that begins at example `start`, in the data's order.

    Returns:
      "images" and "labels" of batch_size / shards examples, and "mask", bool, False for those beyond the last, which
      repeat it.
    """
    local = batch_size // shards
    size = data["labels"].shape[0]
    indices = start + shard * local + jnp.arange(local)
    batch = {name: array[jnp.minimum(indices, size - 1)] for name, array in data.items()}
    return batch | {"mask": indices < size}
