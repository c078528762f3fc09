"""Averaged weights, gradient accumulation, mixing, bfloat16 and traces, in a run and in a step."""

import collections
import contextlib
import copy
import functools
import gzip
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import helpers
from configs import digits
from helpers import checksums, small_dataset, tiny_config
from programs import Program, relative
from regnet_flax import create_model
from regnet_flax.modes import evaluate
from regnet_flax.modes import train as loop
from regnet_flax.modes.setup import datasets, models
from regnet_flax.training import step as steps
from regnet_flax.training.checkpoint import Checkpoints
from regnet_flax.training.optimizer import make_optimizer

RNG = np.random.default_rng(0)
BATCH = {"images": jnp.asarray(RNG.normal(size=(8, 8, 8, 3)), jnp.float32), "labels": jnp.arange(8) % 4}
TX = make_optimizer("sgd", lambda count: jnp.float32(0.1), weight_decay=1e-4)


def make_program(devices=1, model="resnet8", **fields):
    config = digits.get_config(model)
    config.model.overrides.width = 4
    config.train.batch_size = 16
    config.update_from_flattened_dict(fields)
    data = small_dataset()
    return Program(config, data, jax.devices()[:devices])


def states(program, count, state=None):
    """Returns the state after each step, on the host."""
    state, found = state or program.initial_state(), []
    for step in range(count):
        state, _ = program.train(state, step, 1)
        found.append(jax.device_get(state))
    return found


@pytest.fixture(autouse=True, scope="module")
def _shallow():
    with helpers.shallow("resnet8"):
        yield


@pytest.fixture(scope="module")
def plain():
    """A program without any of the options, and its state after each of three steps."""
    program = make_program()
    return program, states(program, 3)


def assert_close(a, b, error):
    assert max(jax.tree.leaves(jax.tree.map(relative, a, b))) < error


# Averaged weights


def test_averages_are_of_the_weights_and_statistics_and_are_what_is_evaluated(plain):
    program = make_program(**{"optimizer.ema_decay": 0.15})  # below the warm-up's decay from the second step on
    start = jax.device_get(program.initial_state())
    expected = {"params": start.params, "batch_stats": start.batch_stats}
    for step, state in enumerate(states(program, 3)):
        latest = {"params": state.params, "batch_stats": state.batch_stats}
        decay = min(0.15, (1 + step) / (10 + step))
        expected = jax.tree.map(lambda a, b, d=decay: d * a.astype(np.float64) + (1 - d) * b, expected, latest)
    assert_close(state.variables, expected, 1e-6)
    other, (*_, last) = plain
    assert last.ema == {}
    assert_close(state.params, last.params, 1e-6)  # averaging changes nothing in training
    averaged = program.evaluate(state)
    assert averaged == program.evaluate(state.replace(params=jax.tree.map(np.zeros_like, state.params)))
    put = state.replace(ema={}, params=state.ema["params"], batch_stats=state.ema["batch_stats"])
    assert averaged == other.evaluate(put) != other.evaluate(last)


@pytest.fixture
def short():
    """Makes epochs of four steps."""
    with helpers.few_digits():
        yield


def test_a_run_with_all_options_goes_on_to_the_same_end_and_gives_the_averages_away(short, tmp_path):
    options = {"optimizer.ema_decay": 0.9, "optimizer.accumulate_steps": 2, "train.mixup": 0.2, "train.cutmix": 1.0}
    options |= {"train.epochs": 1, "dataset.augment": ("flip",)}
    train = functools.partial(loop.train_and_evaluate, devices=jax.devices()[:1])
    train(tiny_config(**options), tmp_path / "whole")
    train(tiny_config(**options, **{"train.max_steps": 1, "eval.every_epochs": 0}), tmp_path / "parts")
    results = train(tiny_config(**options), tmp_path / "parts")
    assert checksums(tmp_path / "parts", 4) == checksums(tmp_path / "whole", 4)
    assert any("ema" in name for name in checksums(tmp_path / "whole", 4))

    config = tiny_config(**options, **{"eval.checkpoint": "last"})
    found = evaluate.evaluate_only(config, tmp_path / "parts", devices=jax.devices()[:1])
    assert found["accuracy"] == results["last"]["eval_accuracy"]
    config.dataset.num_classes = 10
    _, variables, _ = models.load_trained(config, tmp_path / "parts")
    latest = restored(config, tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, variables, latest.ema)
    assert max(jax.tree.leaves(jax.tree.map(relative, variables["params"], latest.params))) > 1e-3


def restored(config, workdir):
    like = Program(config, datasets.open_dataset(config), jax.devices()[:1]).like
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        found = checkpoints.restore(like)
    assert found is not None
    return found[0]


def test_a_model_of_given_weights_begins_with_them_as_averages(plain):
    model, _ = plain
    start = jax.tree.map(lambda a: a + 1, jax.device_get(model.initial_state()))
    start = {"params": start.params, "batch_stats": start.batch_stats}
    config = copy.deepcopy(model.config)
    config.optimizer.ema_decay = 0.5
    program = Program(config, small_dataset(), jax.devices()[:1], start=start)
    jax.tree.map(np.testing.assert_array_equal, program.initial_state().ema, start)
    program.train(program.initial_state(), 0, 1)  # no buffer is donated twice


# Gradient accumulation


def linear(variables, images, train, mutable=()):
    """A model without statistics: its gradient over a batch is the mean of the gradients over its parts."""
    logits = images.reshape(len(images), -1) @ variables["params"]["kernel"]
    return (logits, {}) if train else logits


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_takes_the_step_of_the_whole_batch(parts, unroll):
    params = {"kernel": jnp.asarray(RNG.normal(size=(192, 4)), jnp.float32)}
    state = steps.create_train_state({"params": params}, TX)
    step = functools.partial(steps.train_step, apply_fn=linear, tx=TX, label_smoothing=0.1)
    whole, expected = jax.jit(step)(state, BATCH)
    found, metrics = jax.jit(functools.partial(step, accumulate_steps=parts, unroll=unroll))(state, BATCH)
    assert_close(found.params, whole.params, 1e-6)
    assert_close(found.opt_state, whole.opt_state, 1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), metrics, expected)
    assert relative(found.params["kernel"], params["kernel"]) > 1e-3


def test_each_part_has_statistics_of_its_own_one_after_another():
    """Compares with batches of half the size, whose gradients are averaged by hand."""
    model = create_model("resnet8", num_classes=4, width=4)
    state = steps.create_train_state(model.init(jax.random.key(0), BATCH["images"][:1], train=False), TX)
    step = functools.partial(steps.train_step, apply_fn=model.apply, tx=TX, accumulate_steps=2)
    found, _ = jax.jit(step)(state, BATCH)

    def loss(params, batch_stats, half):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updates = model.apply(variables, BATCH["images"][half], train=True, mutable=["batch_stats"])
        return steps.cross_entropy(logits, BATCH["labels"][half]).mean(), updates["batch_stats"]

    half_gradient = jax.jit(jax.grad(loss, has_aux=True))
    batch_stats, gradients = state.batch_stats, []
    for half in (jnp.arange(4), jnp.arange(4, 8)):
        gradient, batch_stats = half_gradient(state.params, batch_stats, half)
        gradients.append(gradient)
    updates, _ = TX.update(jax.tree.map(lambda a, b: (a + b) / 2, *gradients), state.opt_state, state.params)
    assert_close(found.params, optax.apply_updates(state.params, updates), 1e-4)
    assert_close(found.batch_stats, batch_stats, 1e-5)


@pytest.mark.parametrize("devices", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_parts_and_pairs_are_the_same_on_any_number_of_devices(devices):
    options = {"optimizer.accumulate_steps": 2, "train.mixup": 0.2, "train.cutmix": 1.0, "dtype": "float64"}
    options |= {"optimizer.ema_decay": 0.9}
    with jax.enable_x64(True):
        programs = [make_program(n, **options) for n in (devices, 1)]
        found = [states(program, 2, program.in_float64())[-1] for program in programs]
    assert_close(found[0].params, found[1].params, 1e-6)
    assert_close(found[0].ema, found[1].ema, 1e-6)


# Mixing


def test_probabilities_as_labels_are_those_of_torch():
    import torch

    logits = (4 * RNG.normal(size=(6, 5))).astype("f")
    targets = RNG.dirichlet(np.ones(5), 6).astype("f")
    for smoothing in (0.0, 0.1):
        theirs = torch.nn.functional.cross_entropy(
            torch.tensor(logits), torch.tensor(targets), label_smoothing=smoothing, reduction="none"
        )
        ours = steps.cross_entropy(jnp.asarray(logits), jnp.asarray(targets), smoothing)
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-6)


def test_one_hot_probabilities_take_the_step_of_labels():
    params = {"kernel": jnp.asarray(RNG.normal(size=(192, 4)), jnp.float32)}
    state = steps.create_train_state({"params": params}, TX)
    step = jax.jit(functools.partial(steps.train_step, apply_fn=linear, tx=TX, label_smoothing=0.1))
    soft = BATCH | {"labels": jax.nn.one_hot(BATCH["labels"], 4)}
    (found, metrics), (expected, others) = step(state, soft), step(state, BATCH)
    assert_close(found.params, expected.params, 1e-6)
    np.testing.assert_allclose(metrics["accuracy"], others["accuracy"])


@pytest.mark.parametrize("field", ["train.mixup", pytest.param("train.cutmix", marks=pytest.mark.thorough)])
def test_mixing_changes_the_steps(field, plain):
    _, (first, *_) = plain
    (mixed,) = states(make_program(**{field: 1.0}), 1)
    assert max(jax.tree.leaves(jax.tree.map(relative, mixed.params, first.params))) > 1e-4


# bfloat16


def test_in_bfloat16_parameters_statistics_and_sums_stay_float32():
    program = make_program(**{"dtype": "bfloat16", "optimizer.ema_decay": 0.9, "optimizer.accumulate_steps": 2})
    (state,) = states(program, 1)
    floats = [a for a in jax.tree.leaves(state) if jnp.issubdtype(a.dtype, jnp.floating)]
    assert len(floats) > 40 and {a.dtype for a in floats} == {np.dtype("float32")}
    arithmetic = str(jax.make_jaxpr(lambda v: program.model.apply(v, BATCH["images"], train=False))(state.variables))
    assert re.search(r"bf16\[8,8,8,4\] = (conv_general_dilated|ffi_call)", arithmetic)


@pytest.mark.thorough
def test_in_bfloat16_statistics_are_sums_of_float32():
    """A mean of 4,096 values summed in bfloat16 would stop growing at 256."""
    model = create_model("resnet8", num_classes=4, width=4, dtype=jnp.bfloat16)
    images = jnp.ones((4, 32, 32, 3))
    variables = model.init(jax.random.key(0), images, train=False)
    kernel = jnp.zeros_like(variables["params"]["conv1"]["kernel"]).at[1, 1, 0].set(1.0)
    variables["params"]["conv1"]["kernel"] = kernel  # makes the first channel 1 everywhere
    _, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(updates["batch_stats"]["bn1"]["mean"], 0.1, rtol=1e-5)
    np.testing.assert_allclose(updates["batch_stats"]["bn1"]["var"], 0.9, rtol=1e-5)


# Traces


@pytest.mark.thorough
def test_a_trace_of_a_few_steps(short, tmp_path):
    config = tiny_config(**{"train.max_steps": 9, "eval.every_epochs": 0})
    loop.train_and_evaluate(config, tmp_path, devices=jax.devices()[:1], profile=True)
    (trace,) = (tmp_path / "profile").glob("plugins/profile/*/perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    executed = collections.defaultdict(collections.Counter)
    for event in events:
        if "hlo_op" in event.get("args", {}):
            executed[event["args"]["hlo_module"]][event["name"]] += 1
    step = max(executed.values(), key=lambda operations: operations.total())
    assert len(step) > 20 and collections.Counter(step.values()).most_common(1)[0][0] == 5
    assert list((tmp_path / "profile").glob("plugins/profile/*/*.xplane.pb"))
    assert "trace of 5 calls" in (tmp_path / "train.log").read_text()
