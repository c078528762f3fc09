"""The files that a run writes into its workdir."""

import json
import math
import os
import sys

import jax
import pytest

from faults import events
from helpers import LINE
from regnet_flax import environment
from regnet_flax.errors import WorkdirError
from regnet_flax.files import read_json, write_json
from regnet_flax.training import logs, workdir
from regnet_flax.training.logs import MetricsLog
from regnet_flax.training.workdir import read_metrics


def strictly(text):
    """Parses the lines of a file, and rejects NaN and Infinity, which JSON does not have."""

    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


# metrics.jsonl


def test_lines_are_written_as_they_come(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        for step in (10, 20):
            log.write({"step": step, "train_loss": 1 / step})
            assert [line["step"] for line in strictly((tmp_path / "metrics.jsonl").read_text())][-1] == step
    assert read_metrics(tmp_path) == [{"step": 10, "train_loss": 0.1}, {"step": 20, "train_loss": 0.05}]


@pytest.mark.parametrize(("step", "kept"), [(0, []), (10, [10]), (25, [10, 20]), (30, [10, 20, 30])])
def test_what_was_logged_beyond_the_restored_step_is_cut(tmp_path, step, kept):
    with MetricsLog(tmp_path, 0) as log:
        for number in (10, 20, 30):
            log.write({"step": number})
    with MetricsLog(tmp_path, step) as log:
        assert [line["step"] for line in read_metrics(tmp_path)] == kept
        log.write({"step": 99})
    assert [line["step"] for line in strictly((tmp_path / "metrics.jsonl").read_text())] == [*kept, 99]


def test_a_line_cut_off_in_the_middle_is_dropped(tmp_path, logger, caplog):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "train_loss": 2.0}\n{"step": 20, "train_lo')
    assert read_metrics(tmp_path) == [{"step": 10, "train_loss": 2.0}]
    with MetricsLog(tmp_path, 20) as log:
        log.write({"step": 20, "train_loss": 1.0})
    assert [line["step"] for line in strictly((tmp_path / "metrics.jsonl").read_text())] == [10, 20]
    assert "metrics.jsonl has a damaged line" in caplog.text


DAMAGED_LINES = [b"", b"\xff\xfe\x00", b"3", b"[]", b"{}", b'{"step": null}', b'{"step": "ten"}', b"NaN"]


@pytest.mark.parametrize("line", DAMAGED_LINES)
@pytest.mark.fault("a damaged line of metrics.jsonl")
def test_a_damaged_line_is_dropped_and_the_others_stay(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 10}\n' + line + b'\n{"step": 20, "train_loss": 1.5}\n')
    assert read_metrics(tmp_path) == [{"step": 10}, {"step": 20, "train_loss": 1.5}]
    with MetricsLog(tmp_path, 20) as log:
        log.write({"step": 30})
    assert [line["step"] for line in strictly((tmp_path / "metrics.jsonl").read_text())] == [10, 20, 30]


def test_there_may_be_no_metrics_yet(tmp_path):
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_left_out(tmp_path, bad):
    with MetricsLog(tmp_path, 0) as log:
        log.write({"step": 10, "train_loss": bad, "train_accuracy": 0.5})
    assert strictly((tmp_path / "metrics.jsonl").read_text()) == [{"step": 10, "train_accuracy": 0.5}]


# TensorBoard


def test_tensorboard_has_every_metric(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        log.write(LINE)
        log.write({"step": 2340, "train_loss": math.nan, "train_accuracy": 0.25})
    shown = events(tmp_path)
    assert shown.pop(("train/accuracy", 2340)) == 0.25
    assert {step for _, step in shown} == {1170}
    assert {tag for tag, _ in shown} == {
        "train/epoch",
        "train/loss",
        "train/accuracy",
        "train/learning_rate",
        "train/images_per_second",
        "eval/loss",
        "eval/accuracy",
        "eval/top5_accuracy",
    }
    assert shown["train/loss", 1170] == pytest.approx(1.23456)
    assert shown["eval/top5_accuracy", 1170] == pytest.approx(0.9)


@pytest.mark.parametrize("step", [0, 10, 20])
def test_tensorboard_shows_a_resumed_run_once(tmp_path, step):
    with MetricsLog(tmp_path, 0) as log:
        for number in (10, 20, 30):
            log.write({"step": number, "train_loss": 1.0})
    for file in tmp_path.glob("events.*"):
        file.rename(tmp_path / "events.out.tfevents.0000000000.earlier")  # the names contain the time in seconds
    with MetricsLog(tmp_path, step) as log:
        log.write({"step": step + 5, "train_loss": 2.0})
    shown = {number: value for (_, number), value in events(tmp_path).items()}
    assert shown == {number: 1.0 for number in (10, 20, 30) if number <= step} | {step + 5: 2.0}


def test_without_tensorboardx_there_is_a_warning_only(tmp_path, logger, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with MetricsLog(tmp_path, 0) as log:
        log.write(LINE)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "tensorboardX is not installed: no TensorBoard events are written"
    ]
    assert read_metrics(tmp_path) == [LINE]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


# Other files


def test_json_comes_back(tmp_path):
    value = {"a": [1, 2.5, None, "ä"], "b": {"c": True}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
    assert read_json(tmp_path / "y.json") is None


def test_an_interrupted_write_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", stop)
        write_json(path, {"new": 2})
    assert read_json(path) == {"old": 1}
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert read_json(path) == {"old": 1}
    write_json(path, {"new": 2})
    assert read_json(path) == {"new": 2}


@pytest.mark.parametrize("content", [b'{"a": ', b"", b"\xff\xfe"])
@pytest.mark.fault("a damaged JSON file")
def test_a_damaged_json_file_is_one_line(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(WorkdirError, match="config.json cannot be read") as caught:
        read_json(tmp_path / "config.json")
    assert "\n" not in str(caught.value) and "--workdir" in str(caught.value)


def test_a_config_becomes_plain_json():
    from ml_collections import config_dict

    config = config_dict.create(a=(1, 2), b=config_dict.create(c=config_dict.placeholder(int), d="x"))
    assert workdir.plain(config) == {"a": [1, 2], "b": {"c": None, "d": "x"}}


def test_train_log_has_what_the_run_says_with_the_time_and_the_error_that_ended_it(tmp_path, logger):
    with pytest.raises(OSError), logs.RunLog() as log:
        logger.info("before the workdir is known to be right")
        assert not list(tmp_path.iterdir())
        log.write_to(tmp_path)
        logger.warning("look")
        raise OSError("full")
    logger.info("after")
    first, second, third = (tmp_path / "train.log").read_text().splitlines()
    assert first.startswith("20") and first.endswith(" INFO before the workdir is known to be right")
    assert second.endswith(" WARNING look")
    assert third.endswith(" ERROR OSError: full")
    with logs.RunLog() as log:
        log.write_to(tmp_path)
        logger.info("resumed")
    assert len((tmp_path / "train.log").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("processor\t: 0\nmodel name\t: A: 3 @ 2 GHz\n\nprocessor\t: 1\nmodel name\t: B\n", "A: 3 @ 2 GHz"),
        ("Features : fp\n", "z80"),
    ],
)
def test_the_processor_is_named(monkeypatch, said, name):
    monkeypatch.setattr(environment.pathlib.Path, "read_text", lambda path, encoding: said)
    monkeypatch.setattr(environment.platform, "processor", lambda: "")
    monkeypatch.setattr(environment.platform, "machine", lambda: "z80")
    assert environment.processor() == name


@pytest.mark.parametrize("choice, native", [("auto", True), ("cpu", True), ("plain", False)])
def test_native_operations_are_recorded_where_the_model_has_them(choice, native, monkeypatch):
    monkeypatch.setattr(environment.native_library, "available", lambda: True)
    assert environment.environment(jax.devices("cpu"), choice)["hardware"]["native_operations"] is native


def test_hardware_and_versions_are_recorded():
    found = environment.environment(jax.devices(), "auto")
    assert json.loads(json.dumps(found)) == found
    assert found["hardware"]["devices"] == len(jax.devices())
    assert found["hardware"]["cpu_cores"] >= 1
    assert found["hardware"]["cpu"] == environment.processor()
    assert found["versions"]["jax"] == jax.__version__
    assert found["versions"].keys() >= {"python", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"}
