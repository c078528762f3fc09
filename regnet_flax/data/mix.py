"""Mixup and CutMix: mixes each image of a batch and its target with another one, inside the compiled step.

Zhang et al., arXiv 1710.09412; Yun et al., arXiv 1905.04899. Neighbours are partners: the first and the second image,
the third and the fourth, and so on. The epoch's order makes the partner random, so a device needs no image of another
device, and any number of devices gives the same batch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array
Box = tuple[Array | int, Array | int, Array | int, Array | int]
NO_EPOCH = 0xFFFFFFFF  # folded in where the keys of order and augmentation fold in an epoch


def _partners(array: Array) -> Array:
    return array.reshape(-1, 2, *array.shape[1:])[:, ::-1].reshape(array.shape)


def mixup(images: Array, targets: Array, share: Array | float) -> tuple[Array, Array]:
    """Mixes `share` of each image and target with 1 − `share` of its partner's.

    Args:
      images: float (N, height, width, channels), N even.
      targets: float (N, classes), the probability of each class.
      share: in 0…1.

    Returns:
      Images and targets of the same shapes and types.
    """
    images = share * images + (1 - share) * _partners(images)
    return images, share * targets + (1 - share) * _partners(targets)


def cutmix(images: Array, targets: Array, box: Box) -> tuple[Array, Array]:
    """Pastes the partner's pixels into a box, and mixes the targets by the box's share of the area.

    Args:
      images: float (N, height, width, channels), N even.
      targets: float (N, classes), the probability of each class.
      box: top, bottom, left and right, in pixels; bottom and right are exclusive.

    Returns:
      Images and targets of the same shapes and types.
    """
    top, bottom, left, right = box
    height, width = images.shape[1:3]
    rows, columns = jnp.arange(height), jnp.arange(width)
    inside = ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))
    share = 1 - (bottom - top) * (right - left) / (height * width)
    images = jnp.where(inside[:, :, None], _partners(images), images)
    return images, share * targets + (1 - share) * _partners(targets)


def random_box(key: Array, share: Array | float, height: int, width: int) -> Box:
    """Draws CutMix's box: 1 − `share` of the area, around a uniformly random pixel, clipped at the image's edges."""
    size = jnp.sqrt(1 - share)
    halves = jnp.floor(jnp.array([height, width]) * size).astype(jnp.int32) // 2
    bounds = jnp.array([height, width])
    centre = jax.random.randint(key, (2,), 0, bounds)
    low, high = jnp.clip(centre - halves, 0, bounds), jnp.clip(centre + halves, 0, bounds)
    return low[0], high[0], low[1], high[1]


def mix(
    seed: Array | int,
    step: Array,
    images: Array,
    labels: Array,
    *,
    classes: int,
    mixup_alpha: float,
    cutmix_alpha: float,
) -> tuple[Array, Array]:
    """Mixes a batch, or one device's part of it; if both methods are on, it picks one of them at random.

    Args:
      seed: the run's seed.
      step: steps taken; seed and step alone determine the mixing, which is the same for all images.
      images: float (N, height, width, channels), N even.
      labels: int (N,).
      classes: the number of classes.
      mixup_alpha: mixup's share is drawn from Beta(alpha, alpha); 0: no mixup.
      cutmix_alpha: the same for CutMix.

    Returns:
      Images, and targets, float32 (N, classes).
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), jnp.uint32(NO_EPOCH)), step)
    which, mixup_key, cutmix_key, box_key = jax.random.split(key, 4)
    targets = jax.nn.one_hot(labels, classes)

    def with_mixup():
        share = jax.random.beta(mixup_key, mixup_alpha, mixup_alpha, dtype=images.dtype)
        return mixup(images, targets, share)

    def with_cutmix():
        share = jax.random.beta(cutmix_key, cutmix_alpha, cutmix_alpha)
        return cutmix(images, targets, random_box(box_key, share, *images.shape[1:3]))

    if not cutmix_alpha:
        return with_mixup()
    if not mixup_alpha:
        return with_cutmix()
    return jax.lax.cond(jax.random.bernoulli(which), with_cutmix, with_mixup)
