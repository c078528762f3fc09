"""Augmentation of training images, and normalisation, inside the compiled step.

Each augmentation maps a random key and one uint8 image (height, width, channels) to such an image, so that what an
example becomes depends on its own key alone, not on the batch or the device it is in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
CROP_PADDING = 4  # pixels on each side; He et al. 2015, section 4.2


def crop(key: Array, image: Array) -> Array:
    """A random crop of the image's own size, after padding it with 4 black pixels on each side."""
    padded = jnp.pad(image, ((CROP_PADDING, CROP_PADDING), (CROP_PADDING, CROP_PADDING), (0, 0)))
    top, left = jax.random.randint(key, (2,), 0, 2 * CROP_PADDING + 1)
    return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)


def flip(key: Array, image: Array) -> Array:
    """Mirrored left to right, with probability 1/2."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


AUGMENTATIONS: dict[str, Callable[[Array, Array], Array]] = {"crop": crop, "flip": flip}


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
