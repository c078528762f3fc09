"""Data parallelism: 1, 2 and 8 CPU devices train to the same state, up to rounding.

In float64, because in float32 a rounding error grows ten-thousandfold in five steps if it flips the sign of a ReLU.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
from configs import digits
from helpers import small_dataset
from programs import Program, relative
from regnet_flax.data import augment, feeds
from regnet_flax.training import step as steps
from regnet_flax.training.optimizer import build_optimizer

STEPS = 5


def make_program(devices, **overrides):
    config = digits.get_config("regnet8_convrnn")  # the regulator that traces fastest
    config.model.overrides.width = 4
    config.train.batch_size = 16
    config.eval.batch_size = 8
    config.dataset.augment = ("crop", "flip")
    config.dtype = "float64"
    config.update_from_flattened_dict(overrides)
    data = small_dataset()
    return Program(config, data, jax.devices()[:devices])


@pytest.fixture(autouse=True, scope="module")
def _float64():
    with jax.enable_x64(True):
        yield


def train(program, count=STEPS):
    state = program.in_float64()
    for step in range(count):
        state, _ = program.train(state, step, 1)
    return jax.device_get(state)


@pytest.fixture(autouse=True, scope="module")
def _shallow():
    with helpers.shallow("regnet8_convrnn", "resnet8"):
        yield


@pytest.fixture(scope="module")
def one_device():
    program = make_program(1)
    state = train(program)
    return program, state, program.totals


@pytest.mark.parametrize("devices", [pytest.param(2, marks=pytest.mark.thorough), 8])
def test_any_number_of_devices_trains_to_the_same_state(devices, one_device):
    program = make_program(devices)
    state, expected = train(program), one_device[1]
    assert state.step == STEPS and state.nonfinite_step == -1
    for name in ("params", "batch_stats", "opt_state"):
        errors = jax.tree.map(relative, getattr(state, name), getattr(expected, name))
        assert max(jax.tree.leaves(errors)) < 1e-6, name
    assert program.totals["steps"] == STEPS
    for name, total in one_device[2].items():
        np.testing.assert_allclose(program.totals[name], total, rtol=1e-6)
    assert program.evaluate(state) == pytest.approx(one_device[0].evaluate(expected), rel=1e-6)
    assert program.evaluate(state)["count"] == 21
    outcomes, alone = np.empty((2, 21, 2), np.int32)
    program.evaluate(state, outcomes=outcomes)
    one_device[0].evaluate(expected, outcomes=alone)
    np.testing.assert_array_equal(outcomes, alone)
    np.testing.assert_array_equal(outcomes[:, 0], np.arange(21) % 10)


@pytest.mark.thorough
def test_local_statistics_and_gradients_are_means_over_the_devices():
    """Compares with training on each device's half of the batch separately, with the half's own statistics."""
    fields = {"train.batch_norm": "local", "model.name": "resnet8"}
    program = make_program(2, **fields)
    state = train(program, 1)

    alone = make_program(1, **fields)
    half = jax.jit(lambda s, d, o, shard: _one_half(alone, s, d, o, shard))
    halves = [jax.device_get(half(alone.in_float64(), *_data_and_order(), shard)) for shard in (0, 1)]
    metrics = {name: total for name, total in program.totals.items() if name != "steps"}
    for name in ("params", "batch_stats", "opt_state", "metrics"):
        first, second = (half[1] if name == "metrics" else getattr(half[0], name) for half in halves)
        mean = jax.tree.map(lambda a, b: (a.astype(np.float64) + b) / 2, first, second)
        found = metrics if name == "metrics" else getattr(state, name)
        assert max(jax.tree.leaves(jax.tree.map(relative, found, mean))) < 1e-6, name
        if name == "batch_stats":
            assert max(jax.tree.leaves(jax.tree.map(relative, first, second))) > 1e-2, "the halves must differ"


def _data_and_order():
    data = small_dataset().train
    return {"images": data.images, "labels": data.labels}, feeds.epoch_order(0, 0, len(data.labels))


def _one_half(program, state, data, order, shard):
    batch, keys = feeds.train_batch(data, order, 0, state.step, batch_size=16, shard=shard, shards=2)
    images = augment.augment(("crop", "flip"), keys, batch["images"])
    return steps.train_step(
        state,
        {
            "images": augment.normalize(images, program.config.dataset.mean, program.config.dataset.std),
            "labels": batch["labels"],
        },
        apply_fn=program.model.apply,
        tx=build_optimizer(program.config, 3)[1],
    )


def test_several_steps_a_call_are_the_same_steps(one_device):
    program = make_program(1, **{"train.steps_per_call": 3})

    def run(*counts):
        state, step = program.in_float64(), 0
        for count in counts:
            state, done = program.train(state, step, count)
            step += count
            assert done.sum() == count and program.totals["steps"] == step
        return jax.device_get((state, program.totals))

    jax.tree.map(np.testing.assert_array_equal, run(3, 2), run(1, 1, 1, 1, 1))
    # Compared with the step outside a loop only up to rounding, because images are normalised in float32; so one step.
    errors = jax.tree.map(relative, run(1)[0].params, train(one_device[0], 1).params)
    assert max(jax.tree.leaves(errors)) < 1e-4


def test_a_step_that_is_not_finite_leaves_the_state_and_is_remembered(one_device):
    program = one_device[0]
    state = train(program, 2)
    spoiled = state.replace(params=jax.tree.map(lambda a: a * 1e300, state.params))
    after, _ = program.train(spoiled, 2, 1)
    after, _ = program.train(after, 2, 1)
    assert after.nonfinite_step == 2 and after.step == 2
    for name in ("params", "batch_stats", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(spoiled, name))


def test_the_state_holds_for_any_number_of_devices(one_device):
    assert jax.tree.map(jnp.shape, one_device[1]) == jax.tree.map(lambda a: a.shape, make_program(8).like)
