"""TrivialAugment and RandAugment: draw one or two of fourteen operations per image, inside the compiled step.

Müller & Hutter, arXiv 2103.10158; Cubuk et al., arXiv 1909.13719. Operations, magnitudes and draws are those of
torchvision's TrivialAugmentWide and RandAugment for Pillow images, with nearest neighbours and black fill.

Mapped over a batch, a switch would compute all fourteen for every image. Instead each image is gathered twice: once by
the affine matrix of the drawn operation, and once by a table of values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

# In torchvision's order.
IDENTITY, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, ROTATE = range(6)
BRIGHTNESS, COLOR, CONTRAST, SHARPNESS, POSTERIZE, SOLARIZE, AUTOCONTRAST, EQUALIZE = range(6, 14)
OPERATIONS = 14
LEVELS = 30  # the highest level; the lowest is 0, or −30 for signed operations
RANDAUGMENT_OPERATIONS = 2
RANDAUGMENT_LEVEL = 9


@dataclasses.dataclass(frozen=True)
class Strength:
    """The strength of the operations at level 30; lower levels are proportionally weaker.

    Attributes:
        shear: the slope.
        translation: maps the side along which the image moves to pixels, which are truncated to whole ones.
        rotation: degrees.
        enhancement: how far the factor of brightness, color, contrast and sharpness is from 1.
        bits: how many of the 8 bits posterize removes.
    """

    shear: float
    translation: Callable[[int], float]
    rotation: float
    enhancement: float
    bits: int


WIDE = Strength(shear=0.99, translation=lambda side: 32, rotation=135, enhancement=0.99, bits=6)
RANDAUGMENT = Strength(shear=0.3, translation=lambda side: side * 150 / 331, rotation=30, enhancement=0.9, bits=4)


def trivialaugment(key: Array, image: Array) -> Array:
    """Applies one of the fourteen operations at a random level from 0 to 30: torchvision's TrivialAugmentWide().

    Args:
      key: a random key, which alone determines operation and level.
      image: uint8 (height, width, channels), RGB or one channel.

    Returns:
      uint8 of the same shape.

    Raises:
      ValueError: the image has two channels, or more than three.
    """
    operation_key, level_key, sign_key = jax.random.split(key, 3)
    operation = jax.random.randint(operation_key, (), 0, OPERATIONS)
    level = jax.random.randint(level_key, (), 0, LEVELS + 1)
    return apply(image, operation, _signed(sign_key, level), WIDE)


def randaugment(key: Array, image: Array) -> Array:
    """Applies two of the fourteen operations in sequence, at level 9 of 30: torchvision's RandAugment().

    Arguments, result and errors are those of trivialaugment.
    """

    def one(image: Array, key: Array) -> tuple[Array, None]:
        operation_key, sign_key = jax.random.split(key)
        operation = jax.random.randint(operation_key, (), 0, OPERATIONS)
        return apply(image, operation, _signed(sign_key, RANDAUGMENT_LEVEL), RANDAUGMENT), None

    return jax.lax.scan(one, image, jax.random.split(key, RANDAUGMENT_OPERATIONS))[0]


def _signed(key: Array, level: Array | int) -> Array:
    return jnp.where(jax.random.bernoulli(key), -level, level)


def apply(image: Array, operation: Array | int, level: Array | int, strength: Strength) -> Array:
    """Applies one operation at one level.

    The result equals torchvision's for a Pillow image, except for some values of autocontrast: Pillow scales in float64
    and truncates, so where the exact result is a whole number, Pillow's is one less in 6 % of the cases.

    Args:
      image: uint8 (height, width, channels), RGB or one channel.
      operation: one of the fourteen, from IDENTITY to EQUALIZE.
      level: from −30 to 30; posterize and solarize use its absolute value.
      strength: the meaning of a level.

    Returns:
      uint8 of the same shape.

    Raises:
      ValueError: the image has two channels, or more than three.
    """
    height, width, channels = image.shape
    check_channels(channels)
    operation, level = jnp.asarray(operation), jnp.asarray(level)
    matrices = jnp.asarray(_matrices(strength, height, width))
    moved = affine(image, matrices[jnp.where(operation <= ROTATE, operation, IDENTITY), level + LEVELS])
    # If pixels move, the origin is 0 and the table changes nothing; if they do not, `moved` is the image.
    grey, mean = greys(image.astype(jnp.float32))

    def blend(channel: Array) -> tuple[Array, Array]:
        return _origin(channel, grey[..., 0], mean, operation), _table(channel, operation, level, strength)

    # A loop stores its results. Otherwise a CPU recomputes both for each pixel, and takes three times as long.
    origins, tables = jax.lax.map(blend, jnp.moveaxis(image, -1, 0))
    differences = jnp.moveaxis(moved, -1, 0).astype(jnp.int32) - origins.astype(jnp.int32)
    entries = differences + 255 + tables.shape[1] * jnp.arange(channels)[:, None, None]
    result = jnp.clip(jnp.floor(origins + tables.ravel()[entries]), 0, 255).astype(jnp.uint8)
    return jnp.moveaxis(result, 0, -1)


def check_channels(channels: int) -> None:
    """Raises ValueError unless images have 1 or 3 channels: others have no colours to change."""
    if channels not in (1, 3):
        raise ValueError(f"colour operations need images of 1 or 3 channels, and this has {channels}")


def affine(image: Array, matrix: Sequence[Array] | Array) -> Array:
    """Moves the image by an affine map, like Pillow's Image.transform: nearest neighbour, black fill.

    Args:
      image: (height, width, channels).
      matrix: six int32, in units of 2⁻¹⁶. The pixel in column x and row y comes from column
        matrix[0]·x + matrix[1]·y + matrix[2] and row matrix[3]·x + matrix[4]·y + matrix[5], rounded down.

    Returns:
      An image of the same shape and type.
    """
    x, y = jnp.arange(image.shape[1]), jnp.arange(image.shape[0])[:, None]
    columns = (matrix[0] * x + matrix[1] * y + matrix[2]) >> 16
    rows = (matrix[3] * x + matrix[4] * y + matrix[5]) >> 16
    return pixels_at(image, rows, columns)


def pixels_at(image: Array, y: Array, x: Array) -> Array:
    """Returns the pixels at rows y and columns x, int and broadcast to (height, width); black outside the image."""
    height, width, _ = image.shape
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return jnp.where(inside[..., None], image[jnp.clip(y, 0, height - 1), jnp.clip(x, 0, width - 1)], 0)


def greys(pixels: Array) -> tuple[Array, Array]:
    """Returns each pixel's grey and the mean grey, rounded like Pillow's.

    Args:
      pixels: float32 (height, width, channels), whole numbers from 0 to 255, RGB or one channel.

    Returns:
      float32 (height, width, 1), and int32 ().
    """
    grey = pixels
    if pixels.shape[-1] == 3:
        red, green, blue = pixels[..., :1], pixels[..., 1:2], pixels[..., 2:]
        # Exact in float32: whole numbers below 2²⁴. A matrix product would be rounded on some accelerators.
        grey = jnp.floor((19595 * red + 38470 * green + 7471 * blue + 2**15) / 2**16)
    return grey, (grey.astype(jnp.int32).sum() + grey.size // 2) // grey.size


def _matrices(strength: Strength, height: int, width: int) -> np.ndarray:
    """Returns the matrices of `affine` for each operation up to ROTATE and each level: int32 (6, 61, 6)."""
    levels = np.arange(-LEVELS, LEVELS + 1) / LEVELS
    matrices = np.zeros((ROTATE + 1, len(levels), 6))
    matrices[..., [0, 4]] = 1
    matrices[SHEAR_X, :, 1] = matrices[SHEAR_Y, :, 3] = levels * strength.shear
    matrices[TRANSLATE_X, :, 2] = -np.trunc(levels * strength.translation(width))
    matrices[TRANSLATE_Y, :, 5] = -np.trunc(levels * strength.translation(height))
    angles = np.deg2rad(levels * strength.rotation)
    cos, sin = np.cos(angles).round(15), np.sin(angles).round(15)  # as Pillow does: a quarter of a turn is exact
    x, y = width / 2, height / 2
    matrices[ROTATE] = np.stack([cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y], -1)
    matrices[..., 2] += matrices[..., 0] / 2 + matrices[..., 1] / 2  # from a pixel's corner to its centre
    matrices[..., 5] += matrices[..., 3] / 2 + matrices[..., 4] / 2
    return np.floor(matrices * 2**16 + 0.5).astype(np.int32)


def _origin(channel: Array, grey: Array, mean: Array, operation: Array) -> Array:
    """Returns what a channel, uint8 (height, width), is blended with: float32 of its shape, 0 without blending."""
    height, width = channel.shape
    pixels = channel.astype(jnp.float32)
    padded = jnp.pad(pixels, 1)
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    sums = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * pixels
    inside = np.zeros((height, width), bool)
    inside[1:-1, 1:-1] = True  # Pillow leaves the border as it is
    smooth = jnp.where(inside, jnp.floor((sums + 6.5) / 13), pixels)
    cases = {COLOR: grey, CONTRAST: jnp.broadcast_to(mean.astype(jnp.float32), channel.shape), SHARPNESS: smooth}
    return jnp.select([operation == case for case in cases], list(cases.values()), 0.0)


def _table(channel: Array, operation: Array, level: Array, strength: Strength) -> Array:
    """Returns what is added to a channel's origin, by the channel's difference from it, −255 to 255: float32 (511,)."""
    values, size = jnp.arange(256), jnp.abs(level)
    counts = jnp.bincount(channel.ravel(), length=256)
    darker = jnp.cumsum(counts) - counts
    lowest, highest = jnp.argmax(counts > 0), 255 - jnp.argmax(counts[::-1] > 0)
    stretched = 255 * (values - lowest) // jnp.maximum(highest - lowest, 1)
    share = darker[highest] // 255  # how many pixels each new value gets
    equalized = (share // 2 + darker) // jnp.maximum(share, 1)
    taken = jnp.round(size * strength.bits / LEVELS).astype(jnp.int32)
    cases = {
        POSTERIZE: (values >> taken) << taken,
        SOLARIZE: jnp.where(values < 255 - 8.5 * size, values, 255 - values),
        AUTOCONTRAST: jnp.where(highest > lowest, stretched, values),
        EQUALIZE: jnp.where(share > 0, equalized, values),
    }
    mapped = jnp.select([operation == case for case in cases], list(cases.values()), values)
    # The host computes the products: a compiler may fuse a product with a sum, but Pillow rounds each of them.
    factors = (1 + np.arange(-LEVELS, LEVELS + 1) / LEVELS * strength.enhancement).astype(np.float32)
    products = jnp.asarray(factors[:, None] * np.arange(-255, 256, dtype=np.float32))
    blends = (operation >= BRIGHTNESS) & (operation <= SHARPNESS)
    return jnp.where(blends, products[level + LEVELS], jnp.pad(mapped.astype(jnp.float32), (255, 0)))
