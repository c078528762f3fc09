"""The examples of a batch, on one device or several."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regnet_flax.data import augment, feeds

SIZE = 23
RNG = np.random.default_rng(0)
# The label is the example's index.
DATA = {
    "images": jnp.asarray(RNG.integers(0, 256, (SIZE, 6, 6, 1), dtype=np.uint8)),
    "labels": jnp.arange(SIZE, dtype=jnp.int32),
}


@functools.partial(jax.jit, static_argnames=("batch_size", "shards"))
def train_batch(order, seed, step, batch_size, shard=0, shards=1):
    """Makes a batch like the compiled step, with its keys as numbers and its images augmented."""
    batch, keys = feeds.train_batch(DATA, order, seed, step, batch_size=batch_size, shard=shard, shards=shards)
    augmented = augment.augment(("crop", "flip"), keys, batch["images"])
    return batch | {"keys": jax.random.key_data(keys), "augmented": augmented}


eval_batch = jax.jit(feeds.eval_batch)


@functools.cache
def epoch(seed, epoch, batch_size, shards=1):
    """Returns all batches of an epoch, with the shards' parts concatenated."""
    order = feeds.epoch_order(seed, epoch, SIZE)
    steps = SIZE // batch_size
    batches = []
    for step in range(epoch * steps, (epoch + 1) * steps):
        parts = [train_batch(order, seed, jnp.int32(step), batch_size, shard, shards) for shard in range(shards)]
        batches.append({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    return order, batches


def test_an_order_is_a_permutation_fixed_by_seed_and_epoch():
    orders = {key: np.asarray(feeds.epoch_order(*key, 200)) for key in [(0, 0), (0, 1), (1, 0), (1, 1)]}
    for order in orders.values():
        np.testing.assert_array_equal(np.sort(order), np.arange(200))
        assert order.dtype == np.int32
    assert len({order.tobytes() for order in orders.values()}) == 4
    for key, order in orders.items():
        np.testing.assert_array_equal(feeds.epoch_order(*key, 200), order)


@pytest.mark.parametrize("number", [0, 1, 7])
def test_batch_k_of_an_epoch_is_the_kth_slice_of_its_order(number):
    order, batches = epoch(0, number, 4)
    assert len(batches) == 5
    for k, batch in enumerate(batches):
        expected = np.asarray(order)[4 * k : 4 * k + 4]
        np.testing.assert_array_equal(batch["labels"], expected)
        np.testing.assert_array_equal(batch["images"], np.asarray(DATA["images"])[expected])


@pytest.mark.parametrize("parts", [2, 3])
def test_the_parts_of_a_batch_are_the_same_for_any_number_of_shards(parts):
    order = feeds.epoch_order(0, 0, SIZE)
    for shards in (1, 2):
        taken = [
            feeds.train_batch(DATA, order, 0, jnp.int32(0), batch_size=6 * shards, shard=s, shards=shards, parts=parts)
            for s in range(shards)
        ]
        found = np.stack([np.asarray(batch["labels"]).reshape(parts, -1) for batch, _ in taken], 1).reshape(parts, -1)
        expected = np.asarray(order)[: 6 * shards].reshape(parts, -1)
        np.testing.assert_array_equal(found, expected)


def test_other_examples_are_left_out_in_another_epoch():
    left_out = []
    for number in (0, 1):
        _, batches = epoch(0, number, 4)
        seen = np.concatenate([batch["labels"] for batch in batches])
        assert len(set(seen)) == 20
        left_out.append(set(range(SIZE)) - set(seen))
    assert left_out[0] != left_out[1]


@pytest.mark.parametrize("shards", [2, 4])
def test_shards_together_are_the_batch_of_one_device(shards):
    _, one = epoch(3, 2, 8)
    _, several = epoch(3, 2, 8, shards)
    assert len(one) == len(several) == 2
    for batch, parts in zip(one, several, strict=True):
        for name in batch:
            np.testing.assert_array_equal(parts[name], batch[name], err_msg=name)


@pytest.mark.parametrize(("batch_size", "shards"), [(2, 1), (4, 2), (8, 4), (23, 1)])
def test_an_examples_pixels_do_not_depend_on_where_it_is_in_a_batch(batch_size, shards):
    def pixels(batches):
        return {
            label: image.tobytes()
            for batch in batches
            for label, image in zip(batch["labels"], batch["augmented"], strict=True)
        }

    reference = pixels(epoch(0, 1, 1)[1])
    assert len(reference) == SIZE
    found = pixels(epoch(0, 1, batch_size, shards)[1])
    assert len(found) == SIZE // batch_size * batch_size
    assert found == {label: reference[label] for label in found}


def test_keys_differ_by_example_epoch_and_seed():
    keys = [
        tuple(key)
        for seed, number in [(0, 0), (0, 1), (1, 0), (1, 1)]
        for batch in epoch(seed, number, 1)[1]
        for key in batch["keys"]
    ]
    assert len(set(keys)) == len(keys) == 4 * SIZE


@pytest.mark.parametrize("size", [1, 8, 23])
@pytest.mark.parametrize(("batch_size", "shards"), [(1, 1), (5, 1), (24, 1), (4, 2), (8, 4), (8, 8), (40, 8)])
def test_evaluation_covers_every_example_once(size, batch_size, shards):
    data = {name: array[:size] for name, array in DATA.items()}
    seen = []
    for start in range(0, size, batch_size):
        for shard in range(shards):
            local = batch_size // shards
            batch = eval_batch(data, start + shard * local + jnp.arange(local))
            batch = jax.device_get(batch)
            mask = batch["mask"]
            assert mask.dtype == bool and mask.shape == batch["labels"].shape == (batch_size // shards,)
            np.testing.assert_array_equal(batch["images"], np.asarray(data["images"])[batch["labels"]])
            np.testing.assert_array_equal(batch["labels"][~mask], size - 1)  # padding repeats the last example
            seen.extend(batch["labels"][mask])
    np.testing.assert_array_equal(seen, np.arange(size))
