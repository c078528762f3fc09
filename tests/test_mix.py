"""Mixup and CutMix against plain numpy, image by image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regnet_flax.data import mix

N, HEIGHT, WIDTH, CLASSES = 6, 5, 8, 4
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(N, HEIGHT, WIDTH, 3)).astype("f")
LABELS = np.array([0, 3, 1, 1, 2, 0])
PARTNER = [1, 0, 3, 2, 5, 4]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_mixup(share):
    images, targets = mix.mixup(jnp.asarray(IMAGES), jax.nn.one_hot(LABELS, CLASSES), share)
    for i, partner in enumerate(PARTNER):
        np.testing.assert_allclose(images[i], share * IMAGES[i] + (1 - share) * IMAGES[partner], atol=1e-6)
        expected = np.zeros(CLASSES)
        expected[LABELS[i]] += share
        expected[LABELS[partner]] += 1 - share
        np.testing.assert_allclose(targets[i], expected, atol=1e-6)


@pytest.mark.parametrize("box", [(1, 4, 2, 7), (0, 5, 0, 8), (2, 2, 3, 5), (0, 1, 7, 8)])
def test_cutmix(box):
    top, bottom, left, right = box
    images, targets = mix.cutmix(jnp.asarray(IMAGES), jax.nn.one_hot(LABELS, CLASSES), box)
    for i, partner in enumerate(PARTNER):
        expected = IMAGES[i].copy()
        expected[top:bottom, left:right] = IMAGES[partner, top:bottom, left:right]
        np.testing.assert_array_equal(images[i], expected)
        target, pixels = np.zeros(CLASSES), (bottom - top) * (right - left)
        target[LABELS[i]] += 1 - pixels / (HEIGHT * WIDTH)
        target[LABELS[partner]] += pixels / (HEIGHT * WIDTH)
        np.testing.assert_allclose(targets[i], target, atol=1e-6)


def test_a_box_has_its_share_of_the_area_unless_the_edge_cuts_it_off():
    boxes = jax.vmap(lambda key: jnp.stack(mix.random_box(key, 0.75, 40, 20)))(jax.random.split(jax.random.key(0), 300))
    top, bottom, left, right = np.asarray(boxes).T
    assert (bottom - top).max() == 20 and (right - left).max() == 10  # half of each side
    assert (top >= 0).all() and (bottom <= 40).all() and (left >= 0).all() and (right <= 20).all()
    whole = (top > 0) & (bottom < 40)
    assert 0 < whole.mean() < 1 and (bottom - top)[whole].min() == 20
    assert len(set((top + bottom)[whole])) > 10, "boxes lie everywhere"


compiled = jax.jit(mix.mix, static_argnames=("classes", "mixup_alpha", "cutmix_alpha"))


def mixed(step=0, seed=0, mixup=0.0, cutmix=0.0, images=IMAGES, labels=LABELS):
    alphas = {"mixup_alpha": mixup, "cutmix_alpha": cutmix}
    return compiled(seed, step, jnp.asarray(images), jnp.asarray(labels), classes=CLASSES, **alphas)


def shares(**alphas):
    """Returns the shares of image 0 and its partner, which have different classes, over many steps."""
    return np.array([mixed(step, **alphas)[1][0, LABELS[0]] for step in range(60)])


def test_the_share_is_drawn_anew_each_step_from_beta():
    found = shares(mixup=0.2)
    assert len(set(found)) == 60 and (found >= 0).all() and (found <= 1).all()
    # Beta(0.2, 0.2) has 0.28 of its mass between 0.1 and 0.9, Beta(50, 50) all between 0.3 and 0.7.
    assert 0.1 < ((found > 0.1) & (found < 0.9)).mean() < 0.5
    assert (abs(shares(mixup=50.0) - 0.5) < 0.2).all()


def test_seed_and_step_alone_fix_what_is_mixed():
    again = [mixed(3, mixup=0.4, cutmix=1.0) for _ in range(2)]
    jax.tree.map(np.testing.assert_array_equal, *again)
    for other in (mixed(4, mixup=0.4, cutmix=1.0), mixed(3, seed=1, mixup=0.4, cutmix=1.0)):
        assert not np.array_equal(other[0], again[0][0])
    # A device's part is mixed like in the whole batch.
    halves = [mixed(3, cutmix=1.0, images=IMAGES[part], labels=LABELS[part]) for part in (slice(0, 2), slice(2, 6))]
    whole = mixed(3, cutmix=1.0)
    jax.tree.map(lambda a, b, c: np.testing.assert_array_equal(np.concatenate([a, b]), c), *halves, whole)


def test_where_both_are_on_each_has_its_turn():
    pixels = [np.isin(np.asarray(mixed(step, mixup=1.0, cutmix=1.0)[0]), IMAGES).mean() for step in range(30)]
    cut = np.array(pixels) == 1  # every pixel comes from an image of the batch
    assert 5 < cut.sum() < 25
