"""Several seeds in one program: each trains as it would alone; whole runs of them stop, resume and are evaluated.

Compared with separate runs in float64, because in float32 a rounding error grows ten-thousandfold in five steps.
"""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
from configs import digits
from helpers import checksums
from programs import Program, in_float64
from regnet_flax import create_model
from regnet_flax.analysis import report
from regnet_flax.data.folder import Split
from regnet_flax.data.sources import Dataset
from regnet_flax.errors import ConfigError, Interrupted, NonFiniteError, WorkdirError
from regnet_flax.modes import evaluate
from regnet_flax.modes import train as loop
from regnet_flax.modes.setup import models
from regnet_flax.training.run import averaged
from regnet_flax.training.trainer import Trainer, take_seed

SEEDS = (3, 0)
STEPS = 4  # with 3 steps per epoch
TOLERANCE = 1e-6  # images are normalised in float32


@pytest.fixture(autouse=True, scope="module")
def _small():
    with helpers.few_digits(), helpers.shallow("resnet8", "regnet8_convlstm"):
        yield


def dataset():
    rng = np.random.default_rng(0)

    def split(n):
        return Split(rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8), (np.arange(n) % 10).astype(np.int32))

    return Dataset("synthetic", split(26), split(21), tuple(map(str, range(10))))


def tiny_config(**overrides):
    config = digits.get_config("resnet8")
    config.model.overrides.width = 4
    config.update_from_flattened_dict(overrides)
    return config


def make_program(seeds, together="auto", devices=1, **overrides):
    config = tiny_config(**overrides)
    config.train.batch_size, config.eval.batch_size = 8, 8
    config.dataset.augment = ("crop", "flip")
    config.dtype = "float64"
    data, devices = dataset(), jax.devices()[:devices]
    config.compare.together = together
    return Program(config, data, devices, seeds=(seeds,) if isinstance(seeds, int) else seeds)


def initial_state(program):
    program.totals = None
    return in_float64(program.initial_state())


def train(program, *counts):
    state, step = initial_state(program), 0
    for count in counts or (1,) * STEPS:
        state, done = program.train(state, step, count)
        step += count
        np.testing.assert_array_equal(np.sum(done, -1), count)
        np.testing.assert_array_equal(program.totals["steps"], step)
    return state


def errors(a, b):
    def relative(a, b):
        return float(np.linalg.norm(np.asarray(a, np.float64) - b) / (np.linalg.norm(b) + 1e-8))

    return max(jax.tree.leaves(jax.tree.map(relative, a, b)))


@pytest.fixture(scope="module", params=["resnet8", pytest.param("regnet8_convlstm", marks=pytest.mark.thorough)])
def model(request):
    return request.param


@pytest.fixture(scope="module")
def lone(model):
    """Returns for each seed its program, trained separately, its state and its metrics."""
    with jax.enable_x64(True):
        found = {}
        for seed in SEEDS:
            program = make_program(seed, **{"model.name": model})
            state = jax.device_get(train(program))
            found[seed] = program, state, program.evaluate(state), jax.device_get(program.totals)
        return found


@pytest.fixture(scope="module")
def programs(model):
    with jax.enable_x64(True):
        return {together: make_program(SEEDS, together, **{"model.name": model}) for together in ("always", "never")}


@pytest.mark.parametrize(
    "together, devices", [("always", 2), ("never", 1), pytest.param("always", 1, marks=pytest.mark.thorough)]
)
def test_each_seed_trains_as_it_would_alone(together, devices, model, lone, programs):
    with jax.enable_x64(True):
        program = (
            programs[together] if devices == 1 else make_program(SEEDS, together, devices, **{"model.name": model})
        )
        assert program.trainer.together == (together == "always")
        states = train(program)
        metrics = program.evaluate(states)
        assert jax.tree.map(jnp.shape, states) == jax.tree.map(lambda a: a.shape, program.like)
        for index, seed in enumerate(SEEDS):
            state, (_, expected, expected_metrics, totals) = jax.device_get(take_seed(states, index)), lone[seed]
            for name in ("params", "batch_stats", "opt_state"):
                assert errors(getattr(state, name), getattr(expected, name)) < TOLERANCE, (seed, name)
            assert errors(take_seed(program.totals, index), totals) < TOLERANCE, seed
            assert state.step == STEPS and state.nonfinite_step == -1
            own = {name: value[index] for name, value in metrics.items()}
            assert own == pytest.approx(expected_metrics, rel=TOLERANCE), seed
            if together == "never":  # the same program as in the separate run
                jax.tree.map(np.testing.assert_array_equal, state, expected)
        first, second = (lone[seed][1].params for seed in SEEDS)
        assert errors(first, second) > 0.1, "the seeds must differ"


def test_the_initial_state_is_bitwise_that_of_a_lone_run():
    with jax.enable_x64(True):
        states = make_program(SEEDS).initial_state()
        for index, seed in enumerate(SEEDS):
            jax.tree.map(np.testing.assert_array_equal, take_seed(states, index), make_program(seed).initial_state())


@pytest.mark.thorough
def test_several_steps_a_call_are_the_same_steps():
    with jax.enable_x64(True):
        program = make_program(SEEDS, "always", **{"train.steps_per_call": 3})
        jax.tree.map(np.testing.assert_array_equal, train(program, 3, 1), train(program))


@pytest.mark.parametrize("together", ["always", "never"])
def test_a_seed_that_is_not_finite_stands_still_and_the_others_go_on(together, lone, programs):
    with jax.enable_x64(True):
        program = programs[together]
        states = initial_state(program)
        spoiled = states.replace(params=jax.tree.map(lambda a: a.at[0].multiply(jnp.nan), states.params))
        spoiled_params = jax.device_get(take_seed(spoiled, 0).params)
        for step in range(STEPS):
            spoiled, _ = program.train(spoiled, step, 1)
        np.testing.assert_array_equal(spoiled.nonfinite_step, [0, -1])
        np.testing.assert_array_equal(spoiled.step, [0, STEPS])
        jax.tree.map(np.testing.assert_array_equal, take_seed(spoiled, 0).params, spoiled_params)
        assert errors(jax.device_get(take_seed(spoiled, 1).params), lone[SEEDS[1]][1].params) < TOLERANCE


def test_a_line_has_the_means_and_each_seeds_own():
    line = {"step": 7, "loss": np.array([1.0, 3.0]), "rate": 0.1, "bad": np.array([np.nan, 1.0])}
    found = averaged(line, (5, 9))
    assert found["step"] == 7 and isinstance(found["step"], int)
    assert found["loss"] == 2 and found["rate"] == 0.1 and list(found) == ["step", "loss", "rate", "bad", "seeds"]
    assert found["seeds"] == {"5": {"loss": 1.0}, "9": {"loss": 3.0, "bad": 1.0}}
    alone = averaged({"step": 7, "loss": np.float64(2.5)}, (5,))
    assert alone == {"step": 7, "loss": 2.5} and type(alone["loss"]) is float


# Whole runs

RUN = {"model.name": "resnet8", "train.batch_size": 32, "train.epochs": 3, "train.max_steps": 8, "eval.batch_size": 25}
STEPS_PER_EPOCH = 132 // 32


def run(workdir, seeds=(4, 1), **overrides):
    return loop.train_and_evaluate(tiny_config(**RUN | overrides), workdir, jax.devices()[:1], seeds=seeds)


def read_lines(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("seeds")
    return workdir, run(workdir)


def test_what_a_run_of_several_seeds_leaves(finished):
    workdir, results = finished
    lines = read_lines(workdir)
    assert [line["step"] for line in lines] == [STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH]
    for line in lines:
        assert list(line["seeds"]) == ["4", "1"]
        for name in ("train_loss", "train_accuracy", "eval_loss", "eval_accuracy", "eval_top5_accuracy"):
            own = [line["seeds"][seed][name] for seed in ("4", "1")]
            assert line[name] == pytest.approx(sum(own) / 2, abs=1e-12)
            assert own[0] != own[1] or "accuracy" in name
    assert json.loads((workdir / "config.json").read_text())["seeds"] == [4, 1]
    for seed in ("4", "1"):
        assert results["seeds"][seed]["last"]["eval_loss"] == lines[-1]["seeds"][seed]["eval_loss"]
        assert results["seeds"][seed]["last"]["step"] == 2 * STEPS_PER_EPOCH
    assert results["parameters"] == parameters()
    assert "means of 2 seeds" in (workdir / "train.log").read_text()


def parameters():
    model = create_model("resnet8", width=4)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False))["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def test_a_single_seed_is_a_plain_run(tmp_path):
    results = run(tmp_path / "a", seeds=(4,), **{"train.max_steps": 1})
    run(tmp_path / "b", seeds=(), seed=4, **{"train.max_steps": 1})
    assert results["seed"] == 4 and "seeds" not in results
    assert checksums(tmp_path / "a", 1) == checksums(tmp_path / "b", 1)
    assert "seeds" not in read_lines(tmp_path / "a")[-1]


def test_interrupted_while_evaluating_it_resumes_to_the_same_end(finished, tmp_path, monkeypatch):
    workdir, _ = finished
    evaluate = Trainer.evaluate

    def stop(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", stop)
        with pytest.raises(Interrupted, match=f"Saved at step {STEPS_PER_EPOCH}"):
            run(tmp_path)
    run(tmp_path)
    assert read_lines(tmp_path) == read_lines(workdir)
    assert checksums(tmp_path, 2 * STEPS_PER_EPOCH) == checksums(workdir, 2 * STEPS_PER_EPOCH)


def test_one_seed_of_several_is_evaluated_and_loaded(finished):
    workdir, results = finished
    best = max(reversed(read_lines(workdir)), key=lambda line: line["eval_accuracy"])  # the highest mean
    assert results["best"]["step"] == best["step"]
    found = evaluate.evaluate_only(tiny_config(**RUN, seed=1), workdir, jax.devices()[:1])
    assert found["step"] == best["step"] and found["accuracy"] == best["seeds"]["1"]["eval_accuracy"]
    config = tiny_config(**RUN, **{"seed": 4, "eval.checkpoint": "last", "dataset.num_classes": 10})
    found = evaluate.evaluate_only(config, workdir, jax.devices()[:1])
    assert found["loss"] == results["seeds"]["4"]["last"]["eval_loss"]
    model, variables, _ = models.load_trained(config, workdir)
    shape = jax.eval_shape(lambda: model.apply(variables, jnp.zeros((1, 8, 8, 1)), train=False)).shape
    assert shape == (1, 10)
    with pytest.raises(ConfigError, match="seed is 7: .* has the seeds 4, 1"):
        evaluate.evaluate_only(tiny_config(**RUN, seed=7), workdir, jax.devices()[:1])


@pytest.mark.parametrize("seeds", [(4,), (4, 1, 2), (1, 4)])
def test_other_seeds_are_refused(seeds, finished):
    with pytest.raises(ConfigError, match=r"seeds? .*before"):
        run(finished[0], seeds=seeds)


def test_seeds_that_are_wrong_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="each seed once"):
        run(tmp_path, seeds=(1, 1))


def spoil(monkeypatch, spoiled, after=2):
    """Makes the weights of these seeds, given by index, infinite after so many steps."""
    train = Trainer.train

    def spoil(self, state, totals, step, count):
        if step == after:
            places = jnp.array(spoiled)
            state = state.replace(params=jax.tree.map(lambda a: a.at[places].multiply(np.inf), state.params))
        return train(self, state, totals, step, count)

    monkeypatch.setattr(Trainer, "train", spoil)


def test_a_seed_that_diverges_is_marked_and_the_others_go_on(tmp_path, monkeypatch, finished):
    spoil(monkeypatch, [1])
    results = run(tmp_path)
    assert list(results["seeds"]) == ["4"] and list(results["failed"]) == ["1"]
    assert results["failed"]["1"].startswith("the loss or a gradient is not finite at step 3 of seed 1, learning rate")
    lines = read_lines(tmp_path)
    assert [list(line["seeds"]) for line in lines] == [["4"], ["4"]]
    expected = [line["seeds"]["4"] for line in read_lines(finished[0])]
    assert [line["seeds"]["4"] for line in lines] == expected  # bitwise like beside a seed that did not fail
    assert lines[-1]["eval_loss"] == expected[-1]["eval_loss"]
    assert run(tmp_path) == results  # a finished run says the same
    with pytest.raises(WorkdirError, match=r"seed 1 of .* failed .*name another --config.seed \(4\)"):
        evaluate.evaluate_only(tiny_config(**RUN, seed=1), tmp_path, jax.devices()[:1])
    report.write(tmp_path, {"resnet8": tmp_path})
    text = (tmp_path / "report.md").read_text()
    assert "resnet8: the loss or a gradient is not finite at step 3 of seed 1" in text
    assert "for the single seed 4" in text


def test_the_best_checkpoint_is_that_of_the_seeds_that_are_left(tmp_path, monkeypatch):
    evaluate_ = Trainer.evaluate
    accuracies = iter([[0.2, 0.9], [0.3, 0.1], *[[0.25, 0.1]] * 2])

    def better(self, *args):
        return evaluate_(self, *args) | {"accuracy": np.array(next(accuracies))}

    spoil(monkeypatch, [1], after=STEPS_PER_EPOCH)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", better)
        results = run(tmp_path, **{"train.max_steps": 0, "checkpoint.keep": 99})
    assert list(results["seeds"]) == ["4"] and results["best"]["step"] == 2 * STEPS_PER_EPOCH
    assert results["best"] == results["seeds"]["4"]["best"] and results["best"]["eval_accuracy"] == 0.3
    found = evaluate.evaluate_only(tiny_config(**RUN, seed=4), tmp_path, jax.devices()[:1])
    assert found["step"] == 2 * STEPS_PER_EPOCH


@pytest.mark.thorough
def test_where_all_seeds_diverge_the_run_ends(tmp_path, monkeypatch):
    spoil(monkeypatch, [0, 1])
    with pytest.raises(NonFiniteError, match=r"at step 3 of seed 4, .*the last good checkpoint is step 2"):
        run(tmp_path, **{"checkpoint.every_steps": 2})
