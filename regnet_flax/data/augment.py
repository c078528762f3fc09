"""Augmentation and normalisation of training images, inside the compiled step.

Each augmentation maps a random key and one uint8 image (height, width, channels) to another such image. The result
depends only on the example's own key, not on its batch or device. Only erasing comes after normalisation: the erased
pixels become the mean.
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
ROTATION = 15.0  # degrees, in either direction
JITTER = 0.2  # brightness, contrast and saturation are multiplied by 1 ± this
HUE = 0.1  # share of a turn of the colour wheel, in either direction
TRANSLATION = 0.1  # share of the width and the height, in either direction
ERASE = "erase"  # must come last, because it acts on the normalised image
ERASED_AREA = (0.02, 0.33)  # area of a random box, as a share of the image
ERASED_RATIO = (0.3, 3.3)  # height to width
ERASE_TRIES = 10
ORDERS = np.array(list(itertools.permutations(range(4))), np.int32)  # of the four adjustments of a colour jitter


def crop(key: Array, image: Array) -> Array:
    """Pads the image with 4 black pixels on each side, and takes a random crop of the original size."""
    padded = jnp.pad(image, ((CROP_PADDING, CROP_PADDING), (CROP_PADDING, CROP_PADDING), (0, 0)))
    top, left = jax.random.randint(key, (2,), 0, 2 * CROP_PADDING + 1)
    return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)


def flip(key: Array, image: Array) -> Array:
    """Mirrors the image left to right, with probability 1/2."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def rotate(key: Array, image: Array) -> Array:
    """Rotates the image by up to 15 degrees in either direction: torchvision's RandomRotation(15)."""
    return rotate_by(image, jax.random.uniform(key, minval=-ROTATION, maxval=ROTATION))


def rotate_by(image: Array, degrees: Array | float) -> Array:
    """Rotates the image counter-clockwise about its centre, like Pillow's Image.rotate: nearest neighbour, black fill.

    Like Pillow, it computes source pixels in units of 2⁻¹⁶; the last bit may differ because the cosine is float32.
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
    """Moves the image by whole pixels, up to 10 % of width and height: torchvision's RandomAffine(0, (0.1, 0.1))."""
    height, width, _ = image.shape
    most = TRANSLATION * jnp.array([width, height])
    right, down = jnp.round(jax.random.uniform(key, (2,), minval=-most, maxval=most)).astype(jnp.int32)
    return translate_by(image, right, down)


def translate_by(image: Array, right: Array | int, down: Array | int) -> Array:
    """Moves the image by whole pixels; the uncovered part is black."""
    height, width, _ = image.shape
    return policies.pixels_at(image, jnp.arange(height)[:, None] - down, jnp.arange(width) - right)


def color(key: Array, image: Array) -> Array:
    """Changes brightness, contrast, saturation and hue in random order: ColorJitter(0.2, 0.2, 0.2, 0.1)."""
    order_key, factor_key, hue_key = jax.random.split(key, 3)
    order = jnp.asarray(ORDERS)[jax.random.randint(order_key, (), 0, len(ORDERS))]
    factors = jax.random.uniform(factor_key, (3,), minval=1 - JITTER, maxval=1 + JITTER)
    return adjust_color(image, order, factors, jax.random.uniform(hue_key, minval=-HUE, maxval=HUE))


def adjust_color(image: Array, order: Array, factors: Array, hue: Array | float) -> Array:
    """Adjusts an image like Pillow's ImageEnhance.Brightness, .Contrast and .Color and torchvision's adjust_hue.

    Args:
      image: uint8 (height, width, channels), RGB or one channel, which has neither saturation nor hue.
      order: int (4,), the order in which to change brightness (0), contrast (1), saturation (2) and hue (3).
      factors: (3,), for brightness, contrast and saturation; 1 changes nothing.
      hue: the hue's shift, in turns, from −0.5 to 0.5.

    Returns:
      uint8 of the same shape. Like Pillow, it rounds to whole values after each adjustment.

    Raises:
      ValueError: the image has two channels, or more than three.
    """
    policies.check_channels(image.shape[-1])
    # A switch mapped over examples computes every branch: four times the hue, the most expensive adjustment. So the
    # other three, which share one form, run both before and after the hue, with factor 1 when it is not their turn.
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
    """Moves pixels away from black (0: brightness), the mean grey (1: contrast) or their own grey (2: saturation)."""
    grey, mean = policies.greys(pixels)
    origin = jnp.where(which == 0, 0, jnp.where(which == 1, mean, grey))
    return jnp.floor(jnp.clip(origin + factor * (pixels - origin), 0, 255))


def _turn_hue(pixels: Array, turn: Array) -> Array:
    """Adds `turn` to the hue, which Pillow stores in 0…255 like saturation and value."""
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
    """Sets a random box of a normalised image to 0, the mean, with probability 1/2: torchvision's RandomErasing().

    Zhong et al., arXiv 1708.04896. It uses the first of ten boxes that fits; if none fits, it erases nothing.

    Args:
      key: a random key, which alone determines the box.
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
    """Returns the size of the first box that is smaller than the image in both directions; zeros if none is.

    Args:
      areas: (N,), the boxes' areas as shares of the image.
      ratios: (N,), height to width.
      height: the image's height in pixels.
      width: the image's width in pixels.

    Returns:
      int32 (2,): height and width.
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
      keys: (N,) random keys, one per example.
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
    """Returns (images / 255 − mean) / std in float32, for uint8 images and mean and std per channel or for all."""
    return (images.astype(jnp.float32) / 255 - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def prepare(names: Sequence[str], keys: Array, images: Array, mean: Any, std: Any) -> Array:
    """Makes a model's training input: images augmented, normalised, and erased if the last name is ERASE.

    Args:
      names: keys of AUGMENTATIONS, in order; ERASE may come last.
      keys: (N,) random keys, one per example.
      images: uint8 (N, height, width, channels).
      mean: see `normalize`.
      std: see `normalize`.

    Returns:
      float32 of the same shape.
    """
    if ERASE not in names:
        return normalize(augment(names, keys, images), mean, std)
    pairs = jax.vmap(jax.random.split)(keys)
    images = normalize(augment(names[:-1], pairs[:, 0], images), mean, std)
    return jax.vmap(erase)(pairs[:, 1], images)
