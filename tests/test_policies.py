"""TrivialAugment, RandAugment and random erasing: each operation against Pillow, and the draws."""

import functools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from regnet_flax.data import augment, policies

# In torchvision's order.
NAMES = "Identity ShearX ShearY TranslateX TranslateY Rotate Brightness Color Contrast Sharpness".split()
NAMES += "Posterize Solarize AutoContrast Equalize".split()
BINS = 31


def magnitudes(wide, width, height):
    """Returns torchvision's _augmentation_space of TrivialAugmentWide, or RandAugment."""
    enhance = np.linspace(0, 0.99 if wide else 0.9, BINS)
    shear = np.linspace(0, 0.99 if wide else 0.3, BINS)
    return {
        "ShearX": shear,
        "ShearY": shear,
        "TranslateX": np.linspace(0, 32 if wide else 150 / 331 * width, BINS),
        "TranslateY": np.linspace(0, 32 if wide else 150 / 331 * height, BINS),
        "Rotate": np.linspace(0, 135 if wide else 30, BINS),
        **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), enhance),
        "Posterize": 8 - np.round(np.arange(BINS) / ((BINS - 1) / (6 if wide else 4))),
        "Solarize": np.linspace(255, 0, BINS),
    }


def affine(image, shear=(0, 0), translate=(0, 0)):
    """Applies torchvision.transforms.functional.affine to a Pillow image, without rotation, centre [0, 0]."""
    sx, sy = (math.radians(math.degrees(math.atan(slope))) for slope in shear)
    a, b = math.cos(-sy) / math.cos(sy), -math.cos(-sy) * math.tan(sx) / math.cos(sy)
    c, d = math.sin(-sy) / math.cos(sy), -math.sin(-sy) * math.tan(sx) / math.cos(sy) + 1
    tx, ty = translate
    matrix = (d, -b, -d * tx + b * ty, -c, a, c * tx - a * ty)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)


# torchvision's _apply_op, by name.
PILLOW = {
    "Identity": lambda image, m: image,
    "ShearX": lambda image, m: affine(image, shear=(m, 0)),
    "ShearY": lambda image, m: affine(image, shear=(0, m)),
    "TranslateX": lambda image, m: affine(image, translate=(int(m), 0)),
    "TranslateY": lambda image, m: affine(image, translate=(0, int(m))),
    "Rotate": lambda image, m: image.rotate(m, Image.Resampling.NEAREST),
    "Brightness": lambda image, m: ImageEnhance.Brightness(image).enhance(1 + m),
    "Color": lambda image, m: ImageEnhance.Color(image).enhance(1 + m),
    "Contrast": lambda image, m: ImageEnhance.Contrast(image).enhance(1 + m),
    "Sharpness": lambda image, m: ImageEnhance.Sharpness(image).enhance(1 + m),
    "Posterize": lambda image, m: ImageOps.posterize(image, int(m)),
    "Solarize": lambda image, m: ImageOps.solarize(image, m),
    "AutoContrast": lambda image, m: ImageOps.autocontrast(image),
    "Equalize": lambda image, m: ImageOps.equalize(image),
}
UNSIGNED = ("Posterize", "Solarize")


def picture(height, width, channels, seed=0):
    """Makes areas of colour, as in a photograph, with some noise, without the darkest and brightest values."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(40, 200, (4, 4, 3), dtype=np.uint8)).resize((width, height))
    return (np.asarray(small) + rng.integers(-20, 40, (height, width, 3))).astype(np.uint8)[..., :channels]


@pytest.mark.parametrize(
    ("wide", "height", "width", "channels"),
    [(True, 32, 32, 3), (True, 20, 16, 1), (True, 2, 2, 3), (False, 23, 37, 3)],
)
def test_each_operation_at_each_level_is_pillows(wide, height, width, channels):
    strength = policies.WIDE if wide else policies.RANDAUGMENT
    apply = jax.jit(jax.vmap(functools.partial(policies.apply, strength=strength), (None, 0, 0)))
    operations, levels = np.repeat(np.arange(14), 61), np.tile(np.arange(-30, 31), 14)
    pictures = picture(height, width, channels), np.full((height, width, channels), 7, np.uint8)
    space = magnitudes(wide, width, height)
    for image in pictures:
        results = np.asarray(apply(image, operations, levels))
        pillow = Image.fromarray(image if channels == 3 else image[..., 0])
        for operation, level, result in zip(operations, levels, results, strict=True):
            name = NAMES[operation]
            magnitude = float(space[name][abs(level)]) if name in space else 0.0
            magnitude *= -1 if level < 0 and name not in UNSIGNED else 1
            expected = np.asarray(PILLOW[name](pillow, magnitude)).reshape(image.shape)
            if name == "AutoContrast":  # its rounding has its own test
                expected = np.where(result == expected + 1, result, expected)
            np.testing.assert_array_equal(result, expected, f"{name}, level {level}")
    assert results.dtype == np.uint8


def test_autocontrast_is_pillows_but_for_its_rounding_of_whole_numbers():
    apply = jax.jit(jax.vmap(functools.partial(policies.apply, strength=policies.WIDE), (0, None, None)))
    rng = np.random.default_rng(0)
    bounds = np.array([(low, low + span) for low in range(0, 200, 4) for span in (1, 25, 29, 51, 55)])
    values = np.arange(256).reshape(16, 16, 1)
    images = np.clip(values, bounds[:, :1, None, None], bounds[:, 1:, None, None]).astype(np.uint8)
    results = np.asarray(apply(images, policies.AUTOCONTRAST, rng.integers(-30, 31)))[..., 0]
    expected = np.array([ImageOps.autocontrast(Image.fromarray(image[..., 0])) for image in images])
    low, high = bounds.T[:, :, None, None]
    exact = 255 * (images[..., 0] - low) / (high - low)
    np.testing.assert_array_equal(results, np.floor(exact))
    less = results.astype(int) - expected
    assert set(np.unique(less)) <= {0, 1} and (exact[less == 1] % 1 == 0).all() and 0 < (less == 1).mean() < 0.1


def test_colours_need_one_channel_or_three():
    for policy in (policies.trivialaugment, policies.randaugment):
        for channels in (2, 4):
            with pytest.raises(ValueError, match=f"1 or 3 channels, and this has {channels}"):
                policy(jax.random.key(0), np.zeros((8, 8, channels), np.uint8))


# The draws

KEYS = 6000


def drawn(monkeypatch, policy, applications):
    """Returns the operations and levels that a policy draws, (applications, KEYS) each."""

    def record(image, operation, level, strength):
        return image * 1024 + operation * 64 + level + 30

    monkeypatch.setattr(policies, "apply", record)
    keys = jax.random.split(jax.random.key(5), KEYS)
    codes = np.asarray(jax.vmap(policy, (0, None))(keys, jnp.zeros((), jnp.int32)))
    codes = [codes >> shift & 1023 for shift in range(0, 10 * applications, 10)]
    return [code // 64 for code in codes], [code % 64 - 30 for code in codes]


def is_uniform(values, expected):
    counts = Counter(values.tolist())
    mean = len(values) / len(expected)
    return counts.keys() == set(expected) and all(abs(count - mean) < 5 * mean**0.5 for count in counts.values())


def test_trivialaugment_draws_operation_level_and_sign_uniformly(monkeypatch):
    (operations,), (levels,) = drawn(monkeypatch, policies.trivialaugment, 1)
    assert is_uniform(operations, range(14)) and is_uniform(np.abs(levels), range(31))
    assert is_uniform(np.sign(levels[levels != 0]), (-1, 1))
    together = np.corrcoef([operations, np.abs(levels), np.sign(levels)])
    assert np.abs(together - np.eye(3)).max() < 0.05


def test_randaugment_draws_two_operations_at_level_9(monkeypatch):
    operations, levels = drawn(monkeypatch, policies.randaugment, 2)
    assert all(is_uniform(each, range(14)) for each in operations)
    assert all(is_uniform(each, (-9, 9)) for each in levels)
    together = np.corrcoef([*operations, *levels])
    assert np.abs(together - np.eye(4)).max() < 0.05


def test_two_devices_make_of_an_example_what_one_makes():
    names = ("trivialaugment", "erase")

    def prepare(keys, images):
        return augment.prepare(names, keys, images, (0.5,), (0.2,))

    images = np.stack([picture(16, 16, 3, seed) for seed in range(8)])
    keys = jax.random.split(jax.random.key(2), 8)
    once = jax.jit(prepare)
    together = np.asarray(once(keys, images))
    assert together.shape == images.shape and together.dtype == np.float32
    np.testing.assert_array_equal(once(keys, images), together)
    mesh, spec = jax.sharding.Mesh(jax.devices()[:2], "data"), jax.sharding.PartitionSpec("data")
    parallel = jax.jit(jax.shard_map(prepare, mesh=mesh, in_specs=spec, out_specs=spec))
    np.testing.assert_array_equal(parallel(keys, images), together)
    assert not np.array_equal(once(jax.random.split(jax.random.key(3), 8), images), together)


# Erasing


def torchvision_size(areas, ratios, height, width):
    """Returns the box's height and width, like RandomErasing.get_params."""
    for area, ratio in zip(areas, ratios, strict=True):
        h = round(math.sqrt(height * width * area * ratio))
        w = round(math.sqrt(height * width * area / ratio))
        if h < height and w < width:
            return h, w
    return 0, 0


def test_an_erased_box_is_the_first_that_fits():
    rng = np.random.default_rng(0)
    size = jax.jit(augment.erased_size, static_argnums=(2, 3))
    for height, width in ((32, 32), (8, 50)):
        for _ in range(200):
            areas, ratios = rng.uniform(0.02, 0.33, 10), np.exp(rng.uniform(*np.log((0.3, 3.3)), 10))
            expected = torchvision_size(areas, ratios, height, width)
            assert tuple(size(np.float32(areas), np.float32(ratios), height, width).tolist()) == expected
    assert tuple(size(np.full(10, 0.3), np.full(10, 3.0), 8, 50).tolist()) == (0, 0), "none fits"


def test_half_of_the_images_have_a_box_of_zeros():
    height, width, count = 24, 32, 4000
    keys = jax.random.split(jax.random.key(1), count)
    images = np.asarray(jax.jit(jax.vmap(augment.erase, (0, None)))(keys, jnp.ones((height, width, 3))))
    assert set(np.unique(images)) == {0, 1} and (images == images[..., :1]).all()
    erased = images[..., 0] == 0
    some = erased.any((1, 2))
    assert abs(some.mean() - 0.5) < 0.04
    rows, columns = erased[some].any(2), erased[some].any(1)
    heights, widths = rows.sum(1), columns.sum(1)
    np.testing.assert_array_equal(erased[some].sum((1, 2)), heights * widths)
    rng = np.random.default_rng(2)
    sizes = [
        torchvision_size(rng.uniform(0.02, 0.33, 10), np.exp(rng.uniform(*np.log((0.3, 3.3)), 10)), height, width)
        for _ in range(4000)
    ]
    for mine, theirs in zip((heights, widths), np.array(sizes).T, strict=True):
        assert abs(mine.mean() - theirs.mean()) < 0.5 and abs(mine.std() - theirs.std()) < 0.5
    # All positions of the box are equally likely, which determines its average distance from each border.
    assert abs((rows.argmax(1) - (height - heights) / 2).mean()) < 0.6
    assert abs((columns.argmax(1) - (width - widths) / 2).mean()) < 0.6
    assert (rows.argmax(1) == 0).any() and rows[:, -1].any() and columns[:, 0].any() and columns[:, -1].any()


def test_erasing_comes_after_normalisation():
    images, keys = jnp.full((40, 16, 16, 3), 200, jnp.uint8), jax.random.split(jax.random.key(0), 40)
    mean, std = (0.5, 0.4, 0.3), (0.2,)
    prepare = jax.jit(augment.prepare, static_argnums=(0, 3, 4))
    plain = np.asarray(prepare(("flip",), keys, images, mean, std))
    np.testing.assert_allclose(plain, augment.normalize(images, mean, std), rtol=1e-6)
    result = np.asarray(prepare(("flip", "erase"), keys, images, mean, std))
    changed = (np.abs(result - plain) > 1e-5).any(-1)
    assert (result[changed] == 0).all() and 0.02 < changed.mean() < 0.3
