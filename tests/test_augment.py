"""What augmentation makes of an image, and what that depends on."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regnet_flax.data import augment

# Every pixel another value, none of them 0, which is the padding.
IMAGE = np.arange(1, 1 + 5 * 6 * 2, dtype=np.uint8).reshape(5, 6, 2)


def images_and_keys(count, seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    return jnp.asarray(images), jax.random.split(jax.random.key(seed), count)


def test_a_crop_is_a_window_of_the_padded_image_at_every_offset():
    padded = np.pad(IMAGE, ((4, 4), (4, 4), (0, 0)))
    windows = {padded[y : y + 5, x : x + 6].tobytes(): (y, x) for y in range(9) for x in range(9)}
    assert len(windows) == 81
    keys = jax.random.split(jax.random.key(0), 4000)
    cropped = np.asarray(jax.jit(jax.vmap(augment.crop, (0, None)))(keys, IMAGE))
    assert cropped.shape == (4000, *IMAGE.shape) and cropped.dtype == np.uint8
    counts = Counter(windows[image.tobytes()] for image in cropped)
    assert len(counts) == 81
    assert min(counts.values()) > 20 and max(counts.values()) < 80  # 49 each in the mean


def test_a_flip_mirrors_left_to_right_half_the_time():
    keys = jax.random.split(jax.random.key(1), 2000)
    flipped = np.asarray(jax.jit(jax.vmap(augment.flip, (0, None)))(keys, IMAGE))
    counts = Counter(image.tobytes() for image in flipped)
    mirrored = np.ascontiguousarray(IMAGE[:, ::-1])
    assert counts.keys() == {IMAGE.tobytes(), mirrored.tobytes()}
    assert 900 < counts[mirrored.tobytes()] < 1100
    assert flipped.dtype == np.uint8


def test_the_named_augmentations_are_applied_in_order(monkeypatch):
    table = {"add": lambda key, image: image + 10, "double": lambda key, image: image * 2}
    monkeypatch.setattr(augment, "AUGMENTATIONS", table)
    images, keys = images_and_keys(2)
    images = images // 8
    np.testing.assert_array_equal(augment.augment(("add", "double"), keys, images), (images + 10) * 2)
    np.testing.assert_array_equal(augment.augment(("double", "add"), keys, images), images * 2 + 10)
    np.testing.assert_array_equal(augment.augment((), keys, images), images)


def test_each_augmentation_has_randomness_of_its_own(monkeypatch):
    monkeypatch.setattr(augment, "AUGMENTATIONS", dict.fromkeys("ab", lambda key, image: image * 0 + _low_byte(key)))
    images, keys = images_and_keys(16)
    first, second = augment.augment(("a",), keys, images), augment.augment(("a", "b"), keys, images)
    assert not np.array_equal(first, second)


def _low_byte(key):
    return jax.random.bits(key, (), jnp.uint8)


@pytest.mark.parametrize("names", [(), ("crop",), ("flip",), ("crop", "flip")], ids="-".join)
def test_what_an_example_becomes_depends_on_its_own_key_alone(names):
    images, keys = images_and_keys(8)
    together = augment.augment(names, keys, images)
    assert together.shape == images.shape and together.dtype == jnp.uint8
    order = np.array([3, 7, 0, 5, 2, 6, 1, 4])
    np.testing.assert_array_equal(augment.augment(names, keys[order], images[order]), together[order])
    alone = [augment.augment(names, keys[i : i + 1], images[i : i + 1])[0] for i in range(8)]
    np.testing.assert_array_equal(jnp.stack(alone), together)
    if names:
        others = augment.augment(names, jax.random.split(jax.random.key(9), 8), images)
        assert not np.array_equal(others, together)


def test_normalize():
    images = np.array([0, 51, 102, 255], np.uint8).reshape(1, 2, 1, 2)
    result = augment.normalize(jnp.asarray(images), (0.5, 0.2), (0.5, 0.4))
    assert result.dtype == jnp.float32 and result.shape == images.shape
    np.testing.assert_allclose(result.ravel(), [-1, 0, -0.2, 2], atol=1e-6)
    one_for_all = augment.normalize(jnp.asarray(images), (0.5,), (0.5,))
    np.testing.assert_allclose(one_for_all.ravel(), [-1, -0.6, -0.2, 1], atol=1e-6)
