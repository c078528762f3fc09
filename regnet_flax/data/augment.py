"""Augmentation of training images, and normalisation, inside the compiled step.

Each augmentation maps a random key and one uint8 image (height, width, channels) to such an image, so that what an
example becomes depends on its own key alone, not on the batch or the device it is in. Erasing alone comes after
normalisation: what it erases becomes the mean.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from regnet_flax.data import policies

Array = jax.Array
CROP_PADDING = 4  # pixels on each side; He et al. 2015, section 4.2
ROTATION = 15.0  # degrees, either way
JITTER = 0.2  # brightness, contrast and saturation are multiplied by 1 ± this
HUE = 0.1  # of a turn of the colour wheel, either way
TRANSLATION = 0.1  # of the width and the height, either way
ERASE = "erase"  # must come last, and is done to the normalised image
ERASED_AREA = (0.02, 0.33)  # of a random box, as a share of the image's
ERASED_RATIO = (0.3, 3.3)  # height to width
ERASE_TRIES = 10
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
    cos, sin = _fixed_point(cos), _fixed_point(sin)
    return policies.affine(image, (cos, -sin, left, sin, cos, top))


def _fixed_point(value: Array) -> Array:
    return jnp.floor(value * 2**16 + 0.5).astype(jnp.int32)


def translate(key: Array, image: Array) -> Array:
    """Moved by up to 10 % of its width and height, in whole pixels: torchvision's RandomAffine(0, (0.1, 0.1))."""
    height, width, _ = image.shape
    most = TRANSLATION * jnp.array([width, height])
    right, down = jnp.round(jax.random.uniform(key, (2,), minval=-most, maxval=most)).astype(jnp.int32)
    return translate_by(image, right, down)


def translate_by(image: Array, right: Array | int, down: Array | int) -> Array:
    """The image moved by whole pixels, black where it was not."""
    height, width, _ = image.shape
    return policies.pixels_at(image, jnp.arange(height)[:, None] - down, jnp.arange(width) - right)


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
    policies.check_channels(image.shape[-1])
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
    grey, mean = policies.greys(pixels)
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


def erase(key: Array, image: Array) -> Array:
    """A random box of a normalised image set to 0, the mean, with probability 1/2: torchvision's RandomErasing().

    Zhong et al., arXiv 1708.04896. The first of ten boxes that fits is taken; where none does, nothing is erased.

    Args:
      key: random; it alone fixes the box.
      image: float (height, width, channels).

    Returns:
      An image of the same shape and type.
    """
    whether_key, area_key, ratio_key, place_key = jax.random.split(key, 4)
    height, width, _ = image.shape
    low, high = np.log(ERASED_RATIO)
    areas = jax.random.uniform(area_key, (ERASE_TRIES,), minval=ERASED_AREA[0], maxval=ERASED_AREA[1])
    ratios = jnp.exp(jax.random.uniform(ratio_key, (ERASE_TRIES,), minval=low, maxval=high))
    box = erased_size(areas, ratios, height, width)
    top, left = jax.random.randint(place_key, (2,), 0, jnp.array([height, width]) - box + 1)
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)
    inside = (rows >= top) & (rows < top + box[0]) & (columns >= left) & (columns < left + box[1])
    return jnp.where((inside & jax.random.bernoulli(whether_key))[..., None], 0, image)


def erased_size(areas: Array, ratios: Array, height: int, width: int) -> Array:
    """Height and width of the first box that is smaller than the image both ways; 0 and 0 if none is.

    Args:
      areas: (N,) of the boxes, as shares of the image's.
      ratios: (N,), height to width.
      height: of the image, in pixels, as width.

    Returns:
      int32 (2,).
    """
    areas = areas * height * width
    boxes = jnp.round(jnp.sqrt(jnp.stack([areas * ratios, areas / ratios], -1))).astype(jnp.int32)
    fits = (boxes < jnp.array([height, width])).all(-1)
    return jnp.where(fits.any(), boxes[jnp.argmax(fits)], 0)


AUGMENTATIONS: dict[str, Callable[[Array, Array], Array]] = {
    "crop": crop,
    "flip": flip,
    "rotate": rotate,
    "color": color,
    "translate": translate,
    "trivialaugment": policies.trivialaugment,
    "randaugment": policies.randaugment,
}


def augment(names: Sequence[str], keys: Array, images: Array) -> Array:
    """Applies the named augmentations in order; see also `prepare`.

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


def prepare(names: Sequence[str], keys: Array, images: Array, mean: Any, std: Any) -> Array:
    """What a model trains on: images augmented, normalised, and erased where the last of the names is ERASE.

    Args:
      names: keys of AUGMENTATIONS, in order; ERASE may come last.
      keys: (N,) random keys, one an example.
      images: uint8 (N, height, width, channels).
      mean: see `normalize`, as std.

    Returns:
      float32 of the same shape.
    """
    if ERASE not in names:
        return normalize(augment(names, keys, images), mean, std)
    pairs = jax.vmap(jax.random.split)(keys)
    images = normalize(augment(names[:-1], pairs[:, 0], images), mean, std)
    return jax.vmap(erase)(pairs[:, 1], images)
