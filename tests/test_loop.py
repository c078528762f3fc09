"""Whole runs, in this process, of a width-4 network on the digits."""

import json
import logging
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import checksums, tiny_config
from helpers import metrics as read_lines
from regnet_flax import create_model
from regnet_flax.analysis import report
from regnet_flax.analysis.summary import count_parameters
from regnet_flax.errors import ConfigError, Interrupted, NonFiniteError, WorkdirError
from regnet_flax.modes import train as loop
from regnet_flax.modes.evaluate import evaluate_only
from regnet_flax.training import run
from regnet_flax.training.checkpoint import CHECKPOINTS
from regnet_flax.training.run import Run
from regnet_flax.training.trainer import Trainer

ONE = slice(0, 1)
IMAGE = jnp.zeros((1, 8, 8, 1))
STEPS_PER_EPOCH = 1437 // 128


def train(workdir, **overrides):
    return loop.train_and_evaluate(tiny_config(**overrides), workdir, devices=jax.devices()[ONE])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "deep" / "run"
    return workdir, train(workdir)


def test_what_a_run_leaves(finished):
    workdir, results = finished
    total = 3 * STEPS_PER_EPOCH
    assert results == json.loads((workdir / "results.json").read_text())
    assert results["step"] == total and results["last"]["step"] == total
    assert results["best"]["eval_accuracy"] >= results["last"]["eval_accuracy"] > 0.3
    assert results["hardware"]["devices"] == 1 and results["versions"]["jax"] == jax.__version__
    params = jax.eval_shape(lambda: create_model("regnet8_convgru", width=4).init(jax.random.key(0), IMAGE))["params"]
    assert results["parameters"] == count_parameters(params)
    assert results["wall_time_seconds"] > 0

    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    logged = [step for step in range(1, total + 1) if step % 5 == 0 or step % STEPS_PER_EPOCH == 0]
    assert [line["step"] for line in lines] == logged
    for line in lines:
        assert {"epoch", "train_loss", "train_accuracy", "learning_rate"} <= set(line)
        evaluated = line["step"] % STEPS_PER_EPOCH == 0
        assert ({"eval_loss", "eval_accuracy", "eval_top5_accuracy"} <= set(line)) == evaluated
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]

    config = json.loads((workdir / "config.json").read_text())
    assert config["dataset"]["num_classes"] == 10 and len(config["dataset"]["mean"]) == 1
    assert config["class_names"] == [str(digit) for digit in range(10)]
    assert (workdir / "figures" / "curves.png").read_bytes().startswith(b"\x89PNG")
    by_class = results["per_class"]
    assert [entry["class"] for entry in by_class] == config["class_names"]
    assert sum(entry["images"] for entry in by_class) == sum(entry["predicted"] for entry in by_class) == 360
    right = sum(entry["recall"] * entry["images"] for entry in by_class)
    assert right / 360 == pytest.approx(results["last"]["eval_accuracy"], abs=1e-9)
    for name in ("predictions", "confusion"):
        assert (workdir / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "test accuracy" in (workdir / "train.log").read_text()
    assert list(workdir.glob("events.out.tfevents*"))


def test_eval_finds_what_training_measured(finished):
    workdir, results = finished
    for which, expected in (("last", results["last"]), ("best", results["best"])):
        metrics = evaluate_only(tiny_config(**{"eval.checkpoint": which}), workdir, devices=jax.devices()[ONE])
        assert metrics["step"] == expected["step"] and metrics["count"] == 360
        assert metrics["accuracy"] == expected["eval_accuracy"]
        assert metrics["top5_accuracy"] == expected["eval_top5_accuracy"]
        written = json.loads((workdir / "eval.json").read_text())
        by_class = written.pop("per_class")
        assert written == metrics
        right = sum((entry["recall"] or 0) * entry["images"] for entry in by_class)
        assert right / 360 == pytest.approx(metrics["accuracy"], abs=1e-9)
    assert by_class == json.loads((workdir / "results.json").read_text())["per_class"] or which == "best"
    assert {path.name for path in (workdir / "figures" / "eval").iterdir()} == {"predictions.png", "confusion.png"}
    # A batch that the devices do not divide was that of training: it does not matter here.
    other = evaluate_only(tiny_config(**{"eval.checkpoint": "last", "train.batch_size": 100}), workdir)
    assert other["count"] == 360
    # Another batch size and eight devices count every image once, too.
    again = evaluate_only(tiny_config(**{"eval.batch_size": 56, "eval.checkpoint": "last"}), workdir)
    assert again["count"] == 360
    assert again["accuracy"] == pytest.approx(results["last"]["eval_accuracy"], abs=1 / 360)
    assert again["loss"] == pytest.approx(results["last"]["eval_loss"], rel=1e-3)


def test_a_finished_run_is_only_reported(finished, caplog):
    workdir, results = finished
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    logger = logging.getLogger("regnet_flax")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, "regnet_flax"):
            assert train(workdir) == results
    finally:
        logger.removeHandler(caplog.handler)
    assert "finished" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def test_a_stopped_run_goes_on_to_the_same_end(finished, tmp_path):
    """Stopped in the middle of an epoch and of a logging interval."""
    workdir, _ = finished
    total = 3 * STEPS_PER_EPOCH
    train(tmp_path, **{"train.max_steps": 7, "checkpoint.every_steps": 4, "eval.every_epochs": 0})
    assert sorted(int(p.name) for p in (tmp_path / CHECKPOINTS).iterdir() if p.name.isdigit()) == [4, 7]
    train(tmp_path, **{"checkpoint.every_steps": 4})
    assert checksums(tmp_path, total) == checksums(workdir, total)
    by_step = {line["step"]: line for line in read_lines(tmp_path)}
    expected = {line["step"]: line for line in read_lines(workdir)}
    # Where the first run ended it logged as well, and so began the next interval later.
    assert by_step.keys() == expected.keys() | {7}
    for step in expected.keys() - {10}:
        assert by_step[step] == expected[step]


def test_a_run_that_goes_on_is_not_taken_for_finished_when_it_is_stopped(tmp_path, monkeypatch):
    train(tmp_path, **{"train.max_steps": 3})
    assert (tmp_path / "results.json").exists()

    def stop(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "run", stop)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, **{"train.max_steps": 5})
    assert train(tmp_path, **{"train.max_steps": 5})["step"] == 5


def test_the_best_checkpoint_is_kept_whatever_the_cadence_and_the_time_left_is_said(tmp_path):
    results = train(tmp_path, **{"checkpoint.every_steps": 7, "checkpoint.keep": 1, "train.steps_per_call": 50})
    best = results["best"]["step"]
    metrics = evaluate_only(tiny_config(**{"train.steps_per_call": 50}), tmp_path, devices=jax.devices()[ONE])
    assert metrics["step"] == best and metrics["accuracy"] == results["best"]["eval_accuracy"]
    lines = [line for line in (tmp_path / "train.log").read_text().splitlines() if " step " in line and "epoch" in line]
    assert all(" left" in line for line in lines[1:]) and len(lines) > 3


def test_a_run_that_goes_on_elsewhere_is_warned(tmp_path, monkeypatch):
    train(tmp_path, **{"train.max_steps": 2})
    here = run.environment

    def elsewhere(devices):
        found = here(devices)
        return found | {"hardware": found["hardware"] | {"cpu_cores": 999}}

    monkeypatch.setattr(run, "environment", elsewhere)
    train(tmp_path, **{"train.max_steps": 3})
    assert "cpu_cores" in (tmp_path / "train.log").read_text().partition("the run began elsewhere")[2]


def test_another_config_is_no_matter_before_the_first_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"train": {"batch_size": 7}}))
    assert train(tmp_path, **{"train.max_steps": 1})["step"] == 1


@pytest.mark.fault("SIGTERM in an evaluation, fast suite")
def test_stopped_while_it_evaluates_it_evaluates_when_it_goes_on(finished, tmp_path, monkeypatch):
    workdir, _ = finished
    evaluate = Trainer.evaluate

    def stop(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", stop)
        with pytest.raises(Interrupted, match=f"saved at step {STEPS_PER_EPOCH}") as stopped:
            train(tmp_path)
    assert stopped.value.exit_code == 143
    assert STEPS_PER_EPOCH not in [line["step"] for line in read_lines(tmp_path)]
    # Nothing is trained after the first epoch's evaluation, so that its accuracy is the best one.
    again = train(tmp_path, **{"train.max_steps": STEPS_PER_EPOCH})
    assert again["best"]["step"] == STEPS_PER_EPOCH
    found = evaluate_only(tiny_config(**{"eval.checkpoint": "best"}), tmp_path, devices=jax.devices()[ONE])
    assert found["step"] == STEPS_PER_EPOCH
    train(tmp_path)
    assert read_lines(tmp_path) == read_lines(workdir)
    assert checksums(tmp_path, 3 * STEPS_PER_EPOCH) == checksums(workdir, 3 * STEPS_PER_EPOCH)


def test_a_run_goes_on_from_a_checkpoint_within_a_logging_interval(finished, tmp_path):
    workdir, _ = finished
    total = 3 * STEPS_PER_EPOCH
    config = {"checkpoint.every_steps": 7, "checkpoint.keep": 99}
    train(tmp_path, **config)
    for step in (14, 21, 28, total):  # as if killed after step 13 or so
        path = tmp_path / CHECKPOINTS / str(step)
        path.rename(tmp_path / f"later-{step}")
    (tmp_path / "results.json").unlink()
    train(tmp_path, **config)
    assert checksums(tmp_path, total) == checksums(workdir, total)
    assert read_lines(tmp_path) == read_lines(workdir)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"train.batch_size": 64}, "train.batch_size: 128 before, 64 now"),
        ({"model.name": "regnet8_convrnn"}, "model.name"),
        ({"seed": 1}, "seed: 0 before, 1 now"),
        ({"dataset.mean": (0.5,), "dataset.std": (0.5,)}, "dataset.mean"),
        ({"model.overrides.kernel": "dense"}, "model.overrides.kernel: None before, 'dense' now"),
    ],
)
@pytest.mark.fault("resumed with another config")
def test_another_config_is_refused_with_the_fields(finished, change, words):
    workdir, _ = finished
    before = (workdir / "config.json").read_bytes()
    with pytest.raises(ConfigError) as error:
        train(workdir, **change)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert (workdir / "config.json").read_bytes() == before


@pytest.mark.fault("resumed with other images")
def test_other_images_are_refused(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for index in range(4):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                pixels[..., 2] = 9  # a channel without any variance
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{index}.png")
    config = {
        "dataset.name": "folder",
        "dataset.data_dir": str(tmp_path / "data"),
        "train.batch_size": 8,
        "train.max_steps": 2,
        "eval.batch_size": 8,
        "train.epochs": 6,
    }
    train(tmp_path / "run", **config)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["dataset"]["std"][2] == 1
    for split in ("train", "test"):
        (tmp_path / "data" / split / "a").rename(tmp_path / "data" / split / "c")
    with pytest.raises(ConfigError, match="trained on a, b"):
        evaluate_only(tiny_config(**config), tmp_path / "run", devices=jax.devices()[ONE])
    for split in ("train", "test"):
        (tmp_path / "data" / split / "c").rename(tmp_path / "data" / split / "a")
    pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "data" / "train" / "a" / "0.png")
    with pytest.raises(ConfigError, match="other images"):
        train(tmp_path / "run", **(config | {"train.max_steps": 4}))


@pytest.mark.fault("parameters that are not finite")
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    config = {"checkpoint.every_steps": 2, "optimizer.warmup_epochs": 0.0, "train.max_steps": 6}
    train(tmp_path, **(config | {"train.max_steps": 2}))
    before = checksums(tmp_path, 2)
    # The third step's statistics cannot be finite, whatever the rate.
    restore = Trainer.train

    def spoil(self, state, totals, step, count):
        if step == 2:
            state = state.replace(params=jax.tree.map(lambda a: a * np.float32(np.inf), state.params))
        return restore(self, state, totals, step, count)

    Trainer.train = spoil
    try:
        with pytest.raises(
            NonFiniteError, match=r"at step 3, learning rate 0\.\d+; the last good checkpoint is step 2"
        ):
            train(tmp_path, **config)
    finally:
        Trainer.train = restore
    assert checksums(tmp_path, 2) == before
    assert [p.name for p in (tmp_path / CHECKPOINTS).iterdir() if p.name.isdigit()] == ["2"]


def test_evaluation_reads_the_variables_whatever_the_optimiser_was(finished):
    workdir, results = finished
    other = {
        "optimizer.clip_norm": 1.0,
        "optimizer.momentum": 0.0,
        "optimizer.ema_decay": 0.9,
        "eval.checkpoint": "last",
    }
    for fields in (other, {"optimizer.name": "adamw", "eval.checkpoint": "last"}):
        metrics = evaluate_only(tiny_config(**fields), workdir, devices=jax.devices()[ONE])
        assert metrics["accuracy"] == results["last"]["eval_accuracy"]


def test_a_validation_split_chooses_the_best_and_the_test_split_is_read_once_at_the_end(tmp_path, monkeypatch):
    read, evaluate = [], Trainer.evaluate

    def note(self, variables, split, *args, **options):
        read.append(split)
        return evaluate(self, variables, split, *args, **options)

    monkeypatch.setattr(Trainer, "evaluate", note)
    fields = {"model.name": "resnet8", "train.epochs": 2, "dataset.validation": 137.0}
    results = train(tmp_path, **fields)
    assert read == ["validation", "validation", "test"]
    lines = [line for line in read_lines(tmp_path) if "eval_accuracy" in line]
    assert [round(137 * line["eval_accuracy"], 6) % 1 for line in lines] == [0, 0]  # of 137 images
    assert results["test"]["step"] == results["best"]["step"]
    found = evaluate_only(tiny_config(**fields), tmp_path, devices=jax.devices()[ONE])
    assert results["test"]["test_accuracy"] == found["accuracy"] and results["test"]["test_loss"] == found["loss"]
    assert sum(entry["images"] for entry in results["per_class"]) == 360
    said = (tmp_path / "train.log").read_text()
    assert "1300 training, 137 validation and 360 test images" in said and "test accuracy" in said
    report.write(tmp_path, {"resnet8": tmp_path})
    text = (tmp_path / "report.md").read_text()
    assert f"{100 * (1 - found['accuracy']):.2f}" in text and "that a validation split chose" in text


def test_wrong_input_leaves_nothing_behind(tmp_path):
    with pytest.raises(ConfigError, match="train.epochs"):
        train(tmp_path / "run", **{"train.epochs": 0})
    with pytest.raises(ConfigError, match=r"batch_size is 2000: digits has 1437 .*batch_size=1024"):
        train(tmp_path / "run", **{"train.batch_size": 2000})
    with pytest.raises(WorkdirError, match="no checkpoint"):
        evaluate_only(tiny_config(), tmp_path / "run", devices=jax.devices()[ONE])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"train.batch_norm": "local"}, {"train.steps_per_call": 4}])
def test_variants_of_training_learn(change, tmp_path):
    results = train(tmp_path, **change, **{"model.name": "resnet8", "optimizer.label_smoothing": 0.1})
    assert results["last"]["eval_accuracy"] > 0.3
