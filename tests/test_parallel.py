"""Data parallelism: 1, 2 and 8 CPU devices train to the same state, to rounding.

In float64: in float32 a rounding error grows ten-thousandfold in five steps, wherever it turns the sign of a ReLU.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from regnet_flax.config.resolve import resolve
from regnet_flax.data import augment, feeds
from regnet_flax.data.folder import Split
from regnet_flax.data.sources import Dataset
from regnet_flax.modes import train as loop
from regnet_flax.training import step as steps
from regnet_flax.training.trainer import Program

STEPS = 5


def dataset(train=48, test=21, classes=10):
    rng = np.random.default_rng(0)

    def split(n):
        labels = (np.arange(n) % classes).astype(np.int32)
        return Split(rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8), labels)

    return Dataset("synthetic", split(train), split(test), tuple(map(str, range(classes))))


def make_program(devices, **overrides):
    config = digits.get_config("regnet8_convlstm")
    config.model.overrides.width = 4
    config.train.batch_size = 16
    config.eval.batch_size = 8
    config.dataset.augment = ("crop", "flip")
    config.dtype = "float64"
    config.update_from_flattened_dict(overrides)
    data = dataset()
    return Program(resolve(config, data), data, jax.devices()[:devices], loop.pmap)


@pytest.fixture(autouse=True, scope="module")
def _float64():
    with jax.enable_x64(True):
        yield


def initial_state(program):
    return jax.tree.map(lambda a: a.astype(jnp.float64) if a.dtype == jnp.float32 else a, program.initial_state())


def train(program, count=STEPS):
    state = initial_state(program)
    for step in range(count):
        state, _ = program.train(state, step, 1)
    return jax.device_get(state)


def relative(a, b):
    return float(np.linalg.norm(np.asarray(a, np.float64) - b) / (np.linalg.norm(b) + 1e-8))


@pytest.fixture(scope="module")
def one_device():
    program = make_program(1)
    return program, train(program)


@pytest.mark.parametrize("devices", [2, 8])
def test_any_number_of_devices_trains_to_the_same_state(devices, one_device):
    program = make_program(devices)
    state, expected = train(program), one_device[1]
    assert state.step == STEPS and state.nonfinite_step == -1
    for name in ("params", "batch_stats", "opt_state"):
        errors = jax.tree.map(relative, getattr(state, name), getattr(expected, name))
        assert max(jax.tree.leaves(errors)) < 1e-6, name
    for name, total in expected.sums.items():
        np.testing.assert_allclose(state.sums[name], total, rtol=1e-6)
    assert program.evaluate(state) == pytest.approx(one_device[0].evaluate(expected), rel=1e-6)
    assert program.evaluate(state)["count"] == 21
    outcomes, alone = np.empty((2, 21, 2), np.int32)
    program.evaluate(state, outcomes=outcomes)
    one_device[0].evaluate(expected, outcomes=alone)
    np.testing.assert_array_equal(outcomes, alone)
    np.testing.assert_array_equal(outcomes[:, 0], np.arange(21) % 10)


def test_local_statistics_and_gradients_are_means_over_the_devices():
    """Against each device's half of the batch, trained on alone; the half's own statistics normalise it."""
    program = make_program(2, **{"train.batch_norm": "local"})
    state = train(program, 1)

    alone = make_program(1, **{"train.batch_norm": "local"})
    halves = []
    for shard in (0, 1):
        half = jax.jit(lambda s, d, o, shard=shard: _one_half(alone, s, d, o, shard))
        halves.append(jax.device_get(half(initial_state(alone), alone._train_data, _order(alone))))
    for name in ("params", "batch_stats", "opt_state", "sums"):
        first, second = (getattr(half, name) for half in halves)
        mean = jax.tree.map(lambda a, b: (a.astype(np.float64) + b) / 2, first, second)
        assert max(jax.tree.leaves(jax.tree.map(relative, getattr(state, name), mean))) < 1e-6, name
        if name == "batch_stats":
            assert max(jax.tree.leaves(jax.tree.map(relative, first, second))) > 1e-2, "the halves must differ"


def _order(program):
    return feeds.epoch_order(program._config.seed, 0, program._size)


def _one_half(program, state, data, order, shard):
    batch, keys = feeds.train_batch(data, order, 0, state.step, batch_size=16, shard=shard, shards=2)
    images = augment.augment(("crop", "flip"), keys, batch["images"])
    return steps.train_step(
        state,
        {"images": program._normalize(images), "labels": batch["labels"]},
        apply_fn=program.model.apply,
        tx=program._tx,
    )


def test_several_steps_a_call_are_the_same_steps(one_device):
    program = make_program(1, **{"train.steps_per_call": 3})

    def run(*counts):
        state, step = initial_state(program), 0
        for count in counts:
            state, done = program.train(state, step, count)
            step += count
            assert done == step
        return jax.device_get(state)

    jax.tree.map(np.testing.assert_array_equal, run(3, 2), run(1, 1, 1, 1, 1))
    # Against the step outside a loop to rounding only, images being normalised in float32, and so only one step.
    errors = jax.tree.map(relative, run(1).params, train(one_device[0], 1).params)
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
