"""Augmentation of training images, and normalisation, inside the compiled step.

Each augmentation maps a random key and one uint8 image (height, width, channels) to such an image, so that what an
example becomes depends on its own key alone, not on the batch or the device it is in.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
CROP_PADDING = 4  # pixels on each side; He et al. 2015, section 4.2
ROTATION = 15.0  # degrees, either way
JITTER = 0.2  # brightness, contrast and saturation are multiplied by 1 ± this
HUE = 0.1  # of a turn of the colour wheel, either way
TRANSLATION = 0.1  # of the width and the height, either way
ORDERS = np.array(list(itertools.permutations(range(4))), np.int32)  # of the four adjustments of a colour jitter


def crop(key: Array, image: Array) -> Array:
    """A random crop of the image's own size, after padding it with 4 black pixels on each side."""
    padded = jnp.pad(image, ((CROP_PADDING, CROP_PADDING), (CROP_PADDING, CROP_PADDING), (0, 0)))
    top, left = jax.random.randint(key, (2,), 0, 2 * CROP_PADDING + 1)
    return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)


def flip(key: Array, image: Array) -> Array:
    """Mirrored left to right, with probability 1/2."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def rotate(key: Array, image: Array) -> Array:
    """Rotated by up to 15 degrees either way: torchvision's RandomRotation(15)."""
    return rotate_by(image, jax.random.uniform(key, minval=-ROTATION, maxval=ROTATION))


def rotate_by(image: Array, degrees: Array | float) -> Array:
    """The image rotated counter-clockwise about its centre, as Pillow's Image.rotate does: nearest neighbour, black.

    Pillow counts source pixels in units of 2⁻¹⁶; so does this, but for the last bit, its cosine being of float32.
    """
    height, width, _ = image.shape
    radians = jnp.deg2rad(degrees)
    cos, sin = jnp.cos(radians), jnp.sin(radians)
    to_x, to_y = 0.5 - width / 2, 0.5 - height / 2  # from the centre to the first pixel's
    left = _fixed_point(width / 2 + cos * to_x - sin * to_y)
    top = _fixed_point(height / 2 + sin * to_x + cos * to_y)
    x, y = jnp.arange(width), jnp.arange(height)[:, None]
    cos, sin = _fixed_point(cos), _fixed_point(sin)
    return _pixels(image, (top + sin * x + cos * y) >> 16, (left + cos * x - sin * y) >> 16)


def _fixed_point(value: Array) -> Array:
    return jnp.floor(value * 2**16 + 0.5).astype(jnp.int32)


def _pixels(image: Array, y: Array, x: Array) -> Array:
    """The pixels at rows y and columns x, int and broadcast to (height, width); black where there is none."""
    height, width, _ = image.shape
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return jnp.where(inside[..., None], image[jnp.clip(y, 0, height - 1), jnp.clip(x, 0, width - 1)], 0)


def translate(key: Array, image: Array) -> Array:
    """Moved by up to 10 % of its width and height, in whole pixels: torchvision's RandomAffine(0, (0.1, 0.1))."""
    height, width, _ = image.shape
    most = TRANSLATION * jnp.array([width, height])
    right, down = jnp.round(jax.random.uniform(key, (2,), minval=-most, maxval=most)).astype(jnp.int32)
    return translate_by(image, right, down)


def translate_by(image: Array, right: Array | int, down: Array | int) -> Array:
    """The image moved by whole pixels, black where it was not."""
    height, width, _ = image.shape
    return _pixels(image, jnp.arange(height)[:, None] - down, jnp.arange(width) - right)


def color(key: Array, image: Array) -> Array:
    """Brightness, contrast, saturation and hue changed, in random order: ColorJitter(0.2, 0.2, 0.2, 0.1)."""
    order_key, factor_key, hue_key = jax.random.split(key, 3)
    order = jnp.asarray(ORDERS)[jax.random.randint(order_key, (), 0, len(ORDERS))]
    factors = jax.random.uniform(factor_key, (3,), minval=1 - JITTER, maxval=1 + JITTER)
    return adjust_color(image, order, factors, jax.random.uniform(hue_key, minval=-HUE, maxval=HUE))


def adjust_color(image: Array, order: Array, factors: Array, hue: Array | float) -> Array:
    """What Pillow's ImageEnhance.Brightness, .Contrast and .Color and torchvision's adjust_hue make of an image.

    Args:
      image: uint8 (height, width, channels), RGB or of one channel, which has neither saturation nor hue.
      order: int (4,), in which brightness (0), contrast (1), saturation (2) and hue (3) are changed.
      factors: (3,), of brightness, contrast and saturation; 1 changes nothing.
      hue: what is added to it, in turns, from −0.5 to 0.5.

    Returns:
      uint8 of the same shape; between any two adjustments too values are whole, as Pillow has them.

    Raises:
      ValueError: an image of two channels, or more than three.
    """
    if image.shape[-1] not in (1, 3):
        raise ValueError(f"colours are changed of images of 1 or 3 channels, and this has {image.shape[-1]}")
    # Of a switch that is mapped over examples every branch would be computed: four times the hue, the dearest. So the
    # three others, which are of one form, run both before and after the hue, with factor 1 where it is not their turn.
    at = jnp.argmax(order == 3)
    others = order[jnp.arange(3) + (jnp.arange(3) >= at)]
    pixels = image.astype(jnp.float32)
    for index, which in enumerate(others):
        pixels = _blend(pixels, which, jnp.where(index < at, factors[which], 1))
    pixels = _turn_hue(pixels, jnp.trunc(hue * 255))
    for index, which in enumerate(others):
        pixels = _blend(pixels, which, jnp.where(index < at, 1, factors[which]))
    return pixels.astype(jnp.uint8)


def _blend(pixels: Array, which: Array, factor: Array) -> Array:
    """Away from black (0: brightness), the mean grey (1: contrast) or each pixel's grey (2: saturation)."""
    grey = pixels
    if pixels.shape[-1] == 3:
        red, green, blue = pixels[..., :1], pixels[..., 1:2], pixels[..., 2:]
        # Exact in float32: whole numbers below 2²⁴. A matrix product would be rounded on some accelerators.
        grey = jnp.floor((19595 * red + 38470 * green + 7471 * blue + 2**15) / 2**16)
    mean = (grey.astype(jnp.int32).sum() + grey.size // 2) // grey.size  # rounded, exactly
    origin = jnp.where(which == 0, 0, jnp.where(which == 1, mean, grey))
    return jnp.floor(jnp.clip(origin + factor * (pixels - origin), 0, 255))


def _turn_hue(pixels: Array, turn: Array) -> Array:
    """The hue, which Pillow keeps in 0…255 like saturation and value, plus `turn`."""
    if pixels.shape[-1] == 1:
        return pixels
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    value = pixels.max(-1)
    chroma = value - pixels.min(-1)
    divisor = jnp.maximum(chroma, 1)
    sixths = jnp.where(
        value == red,
        (green - blue) / divisor,
        jnp.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    hue = jnp.floor(jnp.mod(sixths / 6, 1) * 255)
    saturation = jnp.floor(255 * chroma / jnp.maximum(value, 1))
    sixths = jnp.mod(hue + turn, 256) * 6 / 255
    channels = []
    for offset in (5, 3, 1):  # of red, green, blue
        distance = jnp.mod(offset + sixths, 6)
        share = jnp.clip(jnp.minimum(distance, 4 - distance), 0, 1)
        channels.append(jnp.floor(value - value * (saturation / 255) * share + 0.5))
    return jnp.stack(channels, -1)


AUGMENTATIONS: dict[str, Callable[[Array, Array], Array]] = {
    "crop": crop,
    "flip": flip,
    "rotate": rotate,
    "color": color,
    "translate": translate,
}


def augment(names: Sequence[str], keys: Array, images: Array) -> Array:
    """Applies the named augmentations in order.

    Args:
      names: keys of AUGMENTATIONS.
      keys: (N,) random keys, one an example.
      images: uint8 (N, height, width, channels).

    Returns:
      Images of the same shape and type.
    """

    def one(key: Array, image: Array) -> Array:
        for name, subkey in zip(names, jax.random.split(key, len(names)), strict=True):
            image = AUGMENTATIONS[name](subkey, image)
        return image

    return jax.vmap(one)(keys, images) if names else images


def normalize(images: Array, mean: Any, std: Any) -> Array:
    """(images / 255 − mean) / std, float32, for uint8 images and a mean and std a channel, or one of each for all."""
    return (images.astype(jnp.float32) / 255 - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)
