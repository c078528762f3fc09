"""The effect of augmentation on an image, and what it depends on; rotation, colours and translation against Pillow."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from regnet_flax.data import augment

# Every pixel has a different value, and none is 0, the value of the padding.
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
    assert min(counts.values()) > 20 and max(counts.values()) < 80  # 49 each on average


def test_a_flip_mirrors_left_to_right_half_the_time():
    keys = jax.random.split(jax.random.key(1), 2000)
    flipped = np.asarray(jax.jit(jax.vmap(augment.flip, (0, None)))(keys, IMAGE))
    counts = Counter(image.tobytes() for image in flipped)
    mirrored = np.ascontiguousarray(IMAGE[:, ::-1])
    assert counts.keys() == {IMAGE.tobytes(), mirrored.tobytes()}
    assert 900 < counts[mirrored.tobytes()] < 1100
    assert flipped.dtype == np.uint8


# Against Pillow

SIZES = [(32, 32), (31, 45), (8, 8), (64, 40)]  # height, width


def picture(height, width, seed=0):
    """Makes areas of colour, as in a photograph, with some noise."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height))
    return np.clip(np.asarray(small) + rng.integers(-20, 20, (height, width, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_a_rotation_is_pillows(height, width):
    image = picture(height, width)
    rotate = jax.jit(augment.rotate_by)
    differing = []
    for degrees in np.float32([-15, -7.5, -1, 0, 0.01, 3, 14.999, *np.random.default_rng(1).uniform(-15, 15, 60)]):
        expected = np.asarray(Image.fromarray(image).rotate(float(degrees), Image.Resampling.NEAREST))
        differing.append((np.asarray(rotate(image, degrees)) != expected).any(-1).mean())
    # On the border of two source pixels the result may be the other one: here for one pixel in 10,000.
    assert np.mean(differing) < 3e-4 and max(differing) < 3e-3
    assert rotate(image, 0.0).dtype == np.uint8
    assert (np.asarray(rotate(image, 15.0)) == 0).all(-1).mean() > 0.02, "the corners are black"


def test_a_rotation_goes_counter_clockwise():
    image = np.zeros((21, 21, 3), np.uint8)
    image[10, 20] = 255  # in the middle of the right edge
    (row, column, _), *_ = np.argwhere(np.asarray(augment.rotate_by(image, 15.0)))
    assert row < 10 and column > 17


def pillow_hue(image, turns):
    """Applies torchvision.transforms.functional.adjust_hue to a Pillow image."""
    hue, saturation, value = image.convert("HSV").split()
    turned = np.array(hue) + np.int32(turns * 255).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


PILLOW = [
    lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    pillow_hue,
]
blend, turn_hue, adjust_color = (jax.jit(f) for f in (augment._blend, augment._turn_hue, augment.adjust_color))


@pytest.mark.parametrize("which", range(3), ids=["brightness", "contrast", "saturation"])
@pytest.mark.parametrize("factor", [0.8, 0.93, 1, 1.07, 1.2])
def test_brightness_contrast_and_saturation_are_pillows(which, factor):
    factor = np.float32(factor)
    for height, width in SIZES:
        image = picture(height, width)
        expected = np.asarray(PILLOW[which](Image.fromarray(image), float(factor))).astype(int)
        error = np.abs(np.asarray(blend(image.astype("f"), which, factor)) - expected)
        # Both truncate the same number, and may differ where it is nearly whole (a fifth of all with 1.2).
        assert error.max() <= 1 and (error > 0).mean() < 0.05
        if factor != 1:
            assert np.abs(image - expected).max() > 5


@pytest.mark.parametrize("turns", [-0.1, -0.033, 0, 0.02, 0.1, 0.5])
def test_hue_is_pillows(turns):
    rng = np.random.default_rng(0)
    greys = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(1, 256, 3)
    for image in (rng.integers(0, 256, (300, 300, 3), dtype=np.uint8), picture(64, 64), greys):
        expected = np.asarray(pillow_hue(Image.fromarray(image), turns)).astype(int)
        error = np.abs(np.asarray(turn_hue(image.astype("f"), np.trunc(np.float32(turns) * 255))) - expected)
        # Pillow's hue is a whole number, and truncation may differ by one: 0.3 % of all colours differ.
        assert (error.max(-1) > 0).mean() < 0.01 and error.max() <= 6


def test_colours_are_changed_in_each_of_the_24_orders_as_pillow_does():
    assert len({tuple(order) for order in augment.ORDERS}) == 24
    image = picture(32, 32)
    results = set()
    for order in augment.ORDERS:
        factors, turns = np.float32([1.17, 0.84, 1.11]), np.float32(0.07)
        expected = Image.fromarray(image)
        for which in order:
            expected = PILLOW[which](expected, float(turns if which == 3 else factors[which]))
        result = np.asarray(adjust_color(image, order, factors, turns))
        error = np.abs(result - np.asarray(expected).astype(int))
        assert result.dtype == np.uint8 and error.max() <= 9 and (error.max(-1) > 0).mean() < 0.03, order
        results.add(result.tobytes())
    assert len(results) > 20, "the order matters"


def test_an_image_of_one_channel_has_neither_saturation_nor_hue():
    image = picture(16, 16)[..., :1]
    result = adjust_color(image, np.array([3, 1, 2, 0]), np.float32([0.9, 1.2, 1.5]), 0.3)
    expected = PILLOW[0](PILLOW[1](Image.fromarray(image[..., 0]), np.float32(1.2)), np.float32(0.9))
    assert result.shape == (16, 16, 1)
    assert np.abs(np.asarray(result)[..., 0] - np.asarray(expected).astype(int)).max() <= 1
    with pytest.raises(ValueError, match="1 or 3 channels, and this has 2"):
        augment.adjust_color(IMAGE, np.arange(4), np.ones(3), 0.0)


@pytest.mark.parametrize(("right", "down"), [(0, 0), (3, -2), (-3, 3), (0, 4), (40, 0)])
def test_a_translation_is_pillows(right, down):
    image = picture(31, 45)
    moved = Image.fromarray(image).transform((45, 31), Image.Transform.AFFINE, (1, 0, -right, 0, 1, -down))
    np.testing.assert_array_equal(jax.jit(augment.translate_by)(image, right, down), moved)


# The draws


def drawn(monkeypatch, name, augmentation, count, image):
    """Returns what an augmentation passes to its deterministic part, for `count` keys."""
    monkeypatch.setattr(augment, name, lambda image, *parameters: parameters)
    keys = jax.random.split(jax.random.key(3), count)
    return [np.asarray(values) for values in jax.vmap(augmentation, (0, None))(keys, image)]


def is_uniform(values, low, high):
    """Whether 4000 values are in the range, come near both ends, and have a uniform distribution's mean and spread."""
    width = high - low
    within = low <= values.min() < low + 0.01 * width and high - 0.01 * width < values.max() <= high
    return within and abs(values.mean() - (low + high) / 2) < 0.02 * width and abs(values.std() / width - 0.289) < 0.01


def test_angles_are_uniform_within_15_degrees(monkeypatch):
    (degrees,) = drawn(monkeypatch, "rotate_by", augment.rotate, 4000, picture(8, 8))
    assert is_uniform(degrees, -15, 15)


def test_translations_are_whole_pixels_within_a_tenth(monkeypatch):
    right, down = drawn(monkeypatch, "translate_by", augment.translate, 4000, np.zeros((64, 32, 3), np.uint8))
    assert right.dtype == down.dtype == np.int32
    assert set(right) == set(range(-3, 4)) and set(down) == set(range(-6, 7))
    counts = Counter(right.tolist())  # ±3.2 rounded: 0.7 of a pixel's width at the ends, so 0.109 against 0.156
    assert abs(counts[3] / 4000 - 0.109) < 0.02 and abs(counts[0] / 4000 - 0.156) < 0.02
    assert abs(np.corrcoef(right, down)[0, 1]) < 0.05


def test_colours_are_drawn_from_torchvisions_ranges_in_all_24_orders(monkeypatch):
    order, factors, hue = drawn(monkeypatch, "adjust_color", augment.color, 4000, picture(8, 8))
    assert is_uniform(hue, -0.1, 0.1)
    for values in factors.T:
        assert is_uniform(values, 0.8, 1.2)
    counts = Counter(map(tuple, order.tolist()))
    assert len(counts) == 24 and min(counts.values()) > 110 and max(counts.values()) < 230  # 167 each on average
    together = np.corrcoef(np.stack([*factors.T, hue, order[:, 0]]))
    assert np.abs(together - np.eye(5)).max() < 0.06


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


PHOTOS = ("flip", "rotate", "color", "translate")


@pytest.mark.parametrize(
    "names",
    # Those of PHOTOS alone are left to --thorough.
    [
        *((), ("crop", "flip"), PHOTOS),
        *(pytest.param((n,), marks=pytest.mark.thorough if n in PHOTOS else ()) for n in augment.AUGMENTATIONS),
    ],
    ids="-".join,
)
def test_what_an_example_becomes_depends_on_its_own_key_alone(names):
    images, keys = images_and_keys(8)
    augmented = jax.jit(functools.partial(augment.augment, names))
    together = augmented(keys, images)
    assert together.shape == images.shape and together.dtype == jnp.uint8
    order = np.array([3, 7, 0, 5, 2, 6, 1, 4])
    np.testing.assert_array_equal(augmented(keys[order], images[order]), together[order])
    alone = [augmented(keys[i : i + 1], images[i : i + 1])[0] for i in range(8)]
    np.testing.assert_array_equal(jnp.stack(alone), together)
    if names:
        others = augmented(jax.random.split(jax.random.key(9), 8), images)
        assert not np.array_equal(others, together)


def test_normalize():
    images = np.array([0, 51, 102, 255], np.uint8).reshape(1, 2, 1, 2)
    result = augment.normalize(jnp.asarray(images), (0.5, 0.2), (0.5, 0.4))
    assert result.dtype == jnp.float32 and result.shape == images.shape
    np.testing.assert_allclose(result.ravel(), [-1, 0, -0.2, 2], atol=1e-6)
    one_for_all = augment.normalize(jnp.asarray(images), (0.5,), (0.5,))
    np.testing.assert_allclose(one_for_all.ravel(), [-1, -0.6, -0.2, 1], atol=1e-6)
