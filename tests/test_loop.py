"""Whole runs, in this process, of width-4 networks on a few of the digits.

Tracing takes most of the time, once per training, resumption and evaluation: so one run is stopped in many ways.
"""

import datetime
import json
import logging
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import helpers
from helpers import checksums, tiny_config
from helpers import metrics as read_lines
from regnet_flax import create_model
from regnet_flax.analysis import report
from regnet_flax.analysis.summary import count_parameters
from regnet_flax.config.resolve import resolve
from regnet_flax.data import sources
from regnet_flax.data.folder import Split
from regnet_flax.errors import ConfigError, Interrupted, NonFiniteError, WorkdirError
from regnet_flax.modes import train as loop
from regnet_flax.modes.evaluate import evaluate_only
from regnet_flax.modes.setup import models
from regnet_flax.training import run
from regnet_flax.training.checkpoint import CHECKPOINTS
from regnet_flax.training.run import Run
from regnet_flax.training.trainer import Trainer

ONE = slice(0, 1)
IMAGE = jnp.zeros((1, 8, 8, 1))
STEPS_PER_EPOCH = 132 // 32  # 12 steps in all; each epoch skips four images
TOTAL = 3 * STEPS_PER_EPOCH


@pytest.fixture(autouse=True, scope="module")
def _small():
    with helpers.few_digits(), helpers.shallow("resnet8"):
        yield


def train(workdir, **overrides):
    return loop.train_and_evaluate(tiny_config(**overrides), workdir, devices=jax.devices()[ONE])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pictures):
    workdir = tmp_path_factory.mktemp("finished") / "deep" / "run"
    with pictures(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(helpers.Recorder, "calls", [])
        changes = {
            "checkpoint.every_steps": 3,
            "checkpoint.keep": 99,
            "log.trackers": ("tensorboard", "helpers:Recorder"),
        }
        results = train(workdir, **changes)
        (workdir / "tracked.json").write_text(json.dumps(helpers.Recorder.calls[1:]))
    return workdir, results


def test_what_a_run_leaves(finished):
    workdir, results = finished
    assert results == json.loads((workdir / "results.json").read_text())
    assert results["step"] == TOTAL and results["last"]["step"] == TOTAL
    assert results["best"]["eval_accuracy"] >= results["last"]["eval_accuracy"] > 0
    assert results["hardware"]["devices"] == 1 and results["versions"]["jax"] == jax.__version__
    params = jax.eval_shape(lambda: create_model("resnet8", width=4).init(jax.random.key(0), IMAGE))["params"]
    assert results["parameters"] == count_parameters(params)
    assert results["wall_time_seconds"] > 0
    assert datetime.datetime.fromisoformat(results["finished"]) <= datetime.datetime.now(datetime.UTC)

    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    logged = [step for step in range(1, TOTAL + 1) if step % 5 == 0 or step % STEPS_PER_EPOCH == 0]
    assert [line["step"] for line in lines] == logged
    for line in lines:
        assert {"epoch", "train_loss", "train_accuracy", "learning_rate"} <= set(line)
        evaluated = line["step"] % STEPS_PER_EPOCH == 0
        assert ({"eval_loss", "eval_accuracy", "eval_top5_accuracy"} <= set(line)) == evaluated
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]

    config = json.loads((workdir / "config.json").read_text())
    assert config["dataset"]["num_classes"] == 10 and len(config["dataset"]["mean"]) == 1
    assert config["class_names"] == [str(digit) for digit in range(10)]
    by_class = results["per_class"]
    assert [entry["class"] for entry in by_class] == config["class_names"]
    assert sum(entry["images"] for entry in by_class) == sum(entry["predicted"] for entry in by_class) == 60
    right = sum(entry["recall"] * entry["images"] for entry in by_class)
    assert right / 60 == pytest.approx(results["last"]["eval_accuracy"], abs=1e-9)
    for name in ("curves", "predictions", "confusion"):
        assert np.asarray(Image.open(workdir / "figures" / f"{name}.png")).std() > 0
    assert "test accuracy" in (workdir / "train.log").read_text()
    assert list(workdir.glob("events.out.tfevents*"))


def test_a_tracker_gets_the_config_and_every_line(finished):
    workdir, _ = finished
    (_, name, values), *logged, end = json.loads((workdir / "tracked.json").read_text())
    assert name == "run" and (values["train.batch_size"], values["dataset.num_classes"], values["seed"]) == (32, 10, 0)
    for (_, _, step, values), line in zip(logged, read_lines(workdir), strict=True):
        assert values.pop("train/images_per_second", 1) > 0
        assert step == line.pop("step") and list(values.values()) == list(line.values())
    assert "eval/top5_accuracy" in logged[-1][3] and end == ["finish", "run", ""]
    assert json.loads((workdir / "trackers.json").read_text()) == {"helpers:Recorder": {"0": "id0"}}


def test_eval_finds_what_training_measured_whatever_the_optimiser_and_the_batch(finished, pictures):
    workdir, results = finished
    other = {"optimizer.clip_norm": 1.0, "optimizer.momentum": 0.0, "optimizer.ema_decay": 0.9}
    for which, fields in (("last", other), ("best", {"optimizer.name": "adamw"})):
        config, expected = tiny_config(**fields, **{"eval.checkpoint": which}), results[which]
        metrics = evaluate_only(config, workdir, devices=jax.devices()[ONE])
        assert metrics["step"] == expected["step"] and metrics["count"] == 60
        assert metrics["accuracy"] == expected["eval_accuracy"] and metrics["loss"] == expected["eval_loss"]
        assert metrics["top5_accuracy"] == expected["eval_top5_accuracy"]
        written = json.loads((workdir / "eval.json").read_text())
        by_class = written.pop("per_class")
        assert written == metrics
        right = sum((entry["recall"] or 0) * entry["images"] for entry in by_class)
        assert right / 60 == pytest.approx(metrics["accuracy"], abs=1e-9)
        assert by_class == results["per_class"] or which == "best"
    # Another batch size on eight devices also counts every image once. It does not matter that eight does not divide
    # the training batch.
    fields = {"eval.batch_size": 28, "eval.checkpoint": "last", "train.batch_size": 100}
    with pictures():
        again = evaluate_only(tiny_config(**fields), workdir)
    pictured = {path.name: np.asarray(Image.open(path)).std() for path in (workdir / "figures" / "eval").iterdir()}
    assert pictured.keys() == {"predictions.png", "confusion.png"} and all(pictured.values())
    assert again["count"] == 60
    assert again["accuracy"] == pytest.approx(results["last"]["eval_accuracy"], abs=1 / 60)
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
    assert f"{workdir} holds a finished run" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def test_a_finished_run_whose_checkpoints_were_deleted_is_reported_and_not_trained_again(finished, tmp_path):
    workdir, results = finished
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns(CHECKPOINTS))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert train(tmp_path) == results
    with pytest.raises(ConfigError, match="holds a run with another config"):
        train(tmp_path, **{"seed": 7})
    with pytest.raises(WorkdirError, match="without checkpoints, so it cannot be trained longer"):
        train(tmp_path, **{"train.epochs": 30})
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").unlink()
    with pytest.raises(WorkdirError, match="has results but no config.json"):
        train(tmp_path)
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(WorkdirError, match="results.json is damaged, and there are no checkpoints"):
        train(tmp_path)


def test_files_that_are_not_a_runs_are_left_alone(tmp_path):
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / name).write_text('{"a": 1}')
    with pytest.raises(WorkdirError, match="config.json is not what a run writes"):
        train(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "config.json": '{"a": 1}',
        "metrics.jsonl": '{"a": 1}',
    }


def test_a_finished_run_is_not_made_shorter(finished, tmp_path):
    workdir, _ = finished
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    before = {path: path.read_bytes() for path in (tmp_path / "config.json", tmp_path / "results.json")}
    with pytest.raises(ConfigError, match="has taken 12 steps, and .* would now end it at step 5"):
        train(tmp_path, **{"train.max_steps": 5})
    assert {path: path.read_bytes() for path in before} == before


def steps(path):
    return sorted(int(p.name) for p in (path / CHECKPOINTS).iterdir() if p.name.isdigit())


@pytest.mark.fault("SIGTERM in an evaluation, fast suite")
def test_a_run_stopped_again_and_again_ends_as_if_it_had_not_been(finished, tmp_path, monkeypatch):
    workdir, _ = finished
    # Before the first checkpoint another config does no harm.
    stored = json.loads((workdir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | {"seed": 7}))

    # A run stopped during an evaluation evaluates when it resumes.
    evaluate = Trainer.evaluate

    def signalled(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", signalled)
        with pytest.raises(Interrupted, match=f"Saved at step {STEPS_PER_EPOCH}") as stopped:
            train(tmp_path)
    assert stopped.value.exit_code == 143
    assert read_lines(tmp_path) == []
    log = (tmp_path / "train.log").read_text()
    assert "INFO Stopped by SIGTERM. Saved at step" in log.splitlines()[-1] and "ERROR" not in log

    # The run ends in the middle of an epoch and of a logging interval.
    train(tmp_path, **{"train.max_steps": 7})
    assert steps(tmp_path) == [4, 7] and (tmp_path / "results.json").exists()

    # A resumed run that is stopped again does not count as finished.
    def stop(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "run", stop)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path)
    assert not (tmp_path / "results.json").exists()

    # It resumes on other hardware and with another back end, and warns of both.
    here = run.environment

    def elsewhere(*arguments):
        found = here(*arguments)
        return found | {"hardware": found["hardware"] | {"cpu_cores": 999}}

    with monkeypatch.context() as patch:
        patch.setattr(run, "environment", elsewhere)
        assert train(tmp_path, **{"model.overrides.unroll": 1})["step"] == TOTAL
    log = (tmp_path / "train.log").read_text()
    assert "cpu_cores" in log.partition("the run began with other hardware")[2]
    assert log.count("model.overrides.unroll: None before, 1 now: the run resumes up to rounding") == 1
    assert checksums(tmp_path, TOTAL) == checksums(workdir, TOTAL)
    by_step = {line["step"]: line for line in read_lines(tmp_path)}
    expected = {line["step"]: line for line in read_lines(workdir)}
    # When it ended at step 7 it also logged, so the next interval began later.
    assert by_step.keys() == expected.keys() | {7}
    for step in expected.keys() - {8}:
        assert by_step[step] == expected[step]


def test_a_run_goes_on_from_a_checkpoint_within_a_logging_interval(finished, tmp_path):
    workdir, _ = finished
    path = shutil.copytree(workdir, tmp_path / "run")
    assert {3, 6, 9, TOTAL} <= set(steps(path))
    for step in steps(path):
        if step > 6:  # as if killed after step 7, in the interval from step 5 on
            (path / CHECKPOINTS / str(step)).rename(tmp_path / f"later-{step}")
    (path / "results.json").unlink()
    train(path, **{"checkpoint.every_steps": 3, "checkpoint.keep": 99})
    assert checksums(path, TOTAL) == checksums(workdir, TOTAL)
    assert read_lines(path) == read_lines(workdir)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"train.batch_size": 64}, "train.batch_size: 32 before, 64 now"),
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
def test_other_images_are_refused(finished):
    workdir, _ = finished
    names = tuple("abcdefghij")
    with helpers.few_digits(class_names=names), pytest.raises(ConfigError, match="trained on 0, 1, 2"):
        evaluate_only(tiny_config(), workdir, devices=jax.devices()[ONE])
    with helpers.few_digits(train=133), pytest.raises(ConfigError, match="other images"):
        train(workdir, **{"train.max_steps": 99})
    few = sources.load_dataset("digits")
    images = few.train.images.copy()
    images[0, 0, 0] ^= 1
    with helpers.few_digits(train=Split(images, few.train.labels)), pytest.raises(ConfigError, match="other images"):
        train(workdir, **{"train.max_steps": 99})


def test_a_channel_without_variance_is_not_divided_by_zero():
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8)
    images[..., 2] = 9
    split = Split(images, np.arange(8, dtype=np.int32) % 2)
    resolved = resolve(tiny_config(), sources.Dataset("digits", split, split, ("a", "b")))
    assert resolved.dataset.std[2] == 1 and 0.2 < resolved.dataset.std[0] < 0.4


@pytest.mark.fault("parameters that are not finite")
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    config = {"checkpoint.every_steps": 2, "train.max_steps": 6}
    # The third step's statistics cannot be finite, at any learning rate.
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
    assert steps(tmp_path) == [2]
    config = tiny_config(**{"eval.checkpoint": "last", "dataset.num_classes": 10})
    _, variables, step = models.load_trained(config, tmp_path)
    assert step == 2 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))


def test_a_validation_split_chooses_the_best_and_the_test_split_is_read_once_at_the_end(tmp_path, monkeypatch):
    read, evaluate = [], Trainer.evaluate

    def note(self, variables, split, *args, **options):
        read.append(split)
        worse = {"accuracy": 0.0} if len(read) == 2 else {}  # so that the last checkpoint is not the best
        return evaluate(self, variables, split, *args, **options) | worse

    monkeypatch.setattr(Trainer, "evaluate", note)
    fields = {"train.epochs": 2, "dataset.validation": 36.0, "eval.checkpoint": "best"}
    results = train(tmp_path, **fields)
    assert read == ["validation", "validation", "test"]
    lines = [line for line in read_lines(tmp_path) if "eval_accuracy" in line]
    assert [round(36 * line["eval_accuracy"], 6) % 1 for line in lines] == [0, 0]  # of 36 images
    assert results["test"]["step"] == results["best"]["step"] == 3
    found = evaluate_only(tiny_config(**fields), tmp_path, devices=jax.devices()[ONE])
    assert results["test"]["test_accuracy"] == found["accuracy"] and results["test"]["test_loss"] == found["loss"]
    assert sum(entry["images"] for entry in results["per_class"]) == 60
    said = (tmp_path / "train.log").read_text()
    assert "96 training, 36 validation and 60 test images" in said and "test accuracy" in said
    report.write(tmp_path, {"resnet8": tmp_path})
    text = (tmp_path / "report.md").read_text()
    assert f"{100 * (1 - found['accuracy']):.2f}" in text and "that a validation split chose" in text


def test_wrong_input_leaves_nothing_behind(tmp_path):
    with pytest.raises(ConfigError, match="train.epochs"):
        train(tmp_path / "run", **{"train.epochs": 0})
    with pytest.raises(ConfigError, match=r"batch_size is 2000: digits has 132 .*batch_size=128"):
        train(tmp_path / "run", **{"train.batch_size": 2000})
    with pytest.raises(WorkdirError, match="no checkpoint"):
        evaluate_only(tiny_config(), tmp_path / "run", devices=jax.devices()[ONE])
    assert not (tmp_path / "run").exists()


def test_variants_of_training_learn_and_the_best_checkpoint_is_kept_whatever_the_cadence(tmp_path, monkeypatch):
    """In bfloat16, with local statistics and several steps per call; and the time left is logged."""
    config = {"dtype": "bfloat16", "train.batch_norm": "local", "train.steps_per_call": 50}
    config |= {"train.epochs": 2, "optimizer.warmup_epochs": 0.0, "optimizer.label_smoothing": 0.1}
    config |= {"checkpoint.every_steps": 7, "checkpoint.keep": 1, "eval.batch_size": 360}
    evaluate, evaluations = Trainer.evaluate, []

    def worse_later(self, *args):
        evaluations.append(evaluate(self, *args))
        return evaluations[-1] | ({"accuracy": 0.0} if len(evaluations) == 2 else {})

    # One block would not learn enough in two epochs.
    with helpers.few_digits(train=704, test=360), helpers.shallow("resnet8", stage_sizes=(1, 1, 1)):
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "evaluate", worse_later)
            results = train(tmp_path, **config)
        metrics = evaluate_only(tiny_config(**config), tmp_path, devices=jax.devices()[ONE])
    assert steps(tmp_path) == [22, 44]
    assert metrics["step"] == results["best"]["step"] == 22
    assert metrics["accuracy"] == results["best"]["eval_accuracy"]
    assert evaluations[1]["accuracy"] > 0.3
    lines = [line for line in (tmp_path / "train.log").read_text().splitlines() if " step " in line and "epoch" in line]
    assert all(" left" in line for line in lines[1:]) and len(lines) > 3
