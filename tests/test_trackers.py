"""Trackers: what they are given, how a resumed run continues theirs, and what happens when one fails or is missing."""

import json
import math
import os
import struct
import subprocess
import sys

import pytest

from helpers import LINE, Recorder, error_of, run_program, wait_until
from regnet_flax.config.fields import TRACKERS
from regnet_flax.errors import ConfigError
from regnet_flax.trackers import registry
from regnet_flax.training.logs import MetricsLog

SEEDS = {"step": 7, "train_loss": 1.5, "seeds": {"3": {"train_loss": 1.0}, "4": {"train_loss": 2.0}}}
TAGS = {f"train/{name}" for name in ("epoch", "loss", "accuracy", "learning_rate", "images_per_second")}
TAGS |= {f"eval/{name}" for name in ("loss", "accuracy", "top5_accuracy")}

MODULE = """
from helpers import Recorder


class Broken(Recorder):
    def log(self, step, values):
        raise SystemExit("the service\\nis down")
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """What trackers were given; `mine_tracker`, in the current directory, has one that fails."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(Recorder, "calls", [])
    monkeypatch.delitem(sys.modules, "mine_tracker", raising=False)
    (tmp_path / "mine_tracker.py").write_text(MODULE)
    return Recorder.calls


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if (r.name, r.levelname) == ("regnet_flax", "WARNING")]


# A tracker of one's own, and what goes wrong


def test_a_run_and_its_resumption_are_one_run_of_the_tracker(tmp_path, calls, logger, caplog):
    trackers, workdir = ("helpers:Recorder", "mine_tracker:Broken", "tensorboard"), tmp_path / "run"
    for step in (0, 2):
        with MetricsLog(workdir, step, trackers, {"train": {"batch_size": 32}}) as log:
            log.write({"step": step + 1, "learning_rate": 0.5})
            log.write({"step": step + 2, "learning_rate": math.nan})
    started = ("start", "run", (workdir, "run", "", "", 1))
    config = ("config", "run", {"train.batch_size": 32, "seed": 0})
    assert calls[:4] == [started, config, started, config]
    assert json.loads((workdir / "trackers.json").read_text()) == {
        "helpers:Recorder": {"0": "id0"},
        "mine_tracker:Broken": {"0": "id2"},
    }
    starts = [(call[2].id, call[2].step) for call in calls if call[0] == "start"]
    assert starts == [("", 1), ("", 1), ("id0", 3), ("id2", 3)]
    logged = [call[2:] for call in calls if call[0] == "log"]
    assert logged == [(1, {"train/learning_rate": 0.5}), (2, {}), (3, {"train/learning_rate": 0.5}), (4, {})]
    assert [call for call in calls if call[0] == "finish"] == [("finish", "run", "")] * 2
    failed = "log.trackers: mine_tracker:Broken failed and is left out until the run resumes; training continues"
    # Once for each process that trains, though it logs more than once.
    assert warnings(caplog) == [f"{failed} (SystemExit: the service is down)"] * 2


WITHOUT_TORCH = """
import pathlib, sys
from regnet_flax.trackers.registry import Start
from regnet_flax.trackers.tensorboard import TensorBoard
TensorBoard(Start(pathlib.Path(sys.argv[1]), "run", "", "", 0)).log(1, {"loss": 0.5})
assert "tensorboardX" in sys.modules and "torch" not in sys.modules
"""


def test_tensorboard_does_not_wait_for_pytorch(tmp_path):
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, str(tmp_path)], check=True, timeout=100)
    assert len(list(tmp_path.glob("events.*"))) == 1


def test_every_name_has_its_class():
    assert tuple(registry.SHIPPED) == TRACKERS and all(callable(registry._class_of(name)) for name in TRACKERS)


def test_each_seed_is_a_run_of_its_own_and_an_error_is_told(tmp_path, calls):
    with pytest.raises(RuntimeError), MetricsLog(tmp_path / "run", 0, ["helpers:Recorder"], {}, (3, 4)) as log:
        log.write(SEEDS)
        log.write(
            SEEDS | {"step": 8, "train_loss": 2.0, "seeds": {"4": {"train_loss": 2.0}}, "learning_rate": math.nan}
        )
        raise RuntimeError("the\nend")
    starts = [call[2] for call in calls if call[0] == "start"]
    assert [(start.name, start.group) for start in starts] == [("run seed 3", "run"), ("run seed 4", "run")]
    assert [call[2]["seed"] for call in calls if call[0] == "config"] == [3, 4]
    assert calls[4:] == [
        ("log", "run seed 3", 7, {"train/loss": 1.0}),
        ("log", "run seed 4", 7, {"train/loss": 2.0}),
        ("finish", "run seed 3", "its loss or gradient is not finite"),
        ("log", "run seed 4", 8, {"train/loss": 2.0}),
        ("finish", "run seed 4", "RuntimeError: the end"),
    ]
    assert json.loads((tmp_path / "run" / "trackers.json").read_text()) == {
        "helpers:Recorder": {"3": "id0", "4": "id2"}
    }


def test_a_damaged_file_of_ids_is_warned_of(tmp_path, calls, logger, caplog):
    for text in ("{", "[]", '{"helpers:Recorder": 3}'):
        (tmp_path / "trackers.json").write_text(text)
        with MetricsLog(tmp_path, 0, ["helpers:Recorder"]):
            assert calls[-2][2].id == ""
    assert [message for message in warnings(caplog)] == [
        f"{tmp_path / 'trackers.json'} is damaged: trackers start new runs"
    ] * 3


def test_a_missing_package_or_class_is_one_line_before_anything_is_made(tmp_path, calls, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    for name, said in (
        ("trackio", 'the package trackio is not installed: pip install "regnet-flax[trackio]"'),
        ("mine_tracker:Other", "mine_tracker has no class Other"),
        ("mine_other:Other", "'mine_other' cannot be imported"),
    ):
        for mode in ("train", "compare"):
            arguments = [
                f"--mode={mode}",
                f"--config.log.trackers=('{name}',)",
                "--workdir=run",
                "--config.train.max_steps=1",
            ]
            arguments += ["--config.compare.models=('resnet8',)"] if mode == "compare" else []
            assert said in error_of(run_program(*arguments), 2)
    assert not os.path.exists("run")
    (tmp_path / "wandb").mkdir()  # what W&B leaves, which Python takes for a package
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError, match="wandb is not installed"):
        registry.check_installed(["wandb"])


# The services, each in its local mode

LATER = LINE | {"step": 2340, "train_loss": 0.5}


def run_and_resume(workdir, name):
    """Logs LINE, ends before it is saved, logs it again and goes on; returns the id of the tracker's run."""
    config = {"train": {"batch_size": 32, "epochs": 3}, "dataset": {"augment": ("crop", "flip")}}
    with pytest.raises(RuntimeError), MetricsLog(workdir, 0, [name], config) as log:
        log.write(LINE)
        raise RuntimeError
    before = json.loads((workdir / "trackers.json").read_text())
    config["train"]["epochs"] = 4
    with MetricsLog(workdir, 1169, [name], config) as log:
        log.write(LINE)
        log.write(LATER)
    assert json.loads((workdir / "trackers.json").read_text()) == before
    return before[name]["0"]


def run_seeds(workdir, name):
    """Logs a line of two seeds; returns the ids of their runs."""
    with MetricsLog(workdir, 0, [name], {}, (3, 4)) as log:
        log.write(SEEDS)
    ids = json.loads((workdir / "trackers.json").read_text())[name]
    assert list(ids) == ["3", "4"] and len(set(ids.values())) == 2
    return list(ids.values())


def offline_records(folder):
    """The records of W&B's file of a run that was offline: blocks of 32 KiB after 7 bytes, as in LevelDB's logs."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("*.wandb")
    content, place, whole = file.read_bytes(), 7, b""
    while place < len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        if place + 7 > len(content):
            return  # it is still being written
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        if place + 7 + length > len(content):
            return
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(whole)
            whole = b""


def history_of(folders, count):
    """The lines that W&B logged, so many of them. It writes them a moment after the run has finished."""

    def read():
        records = (record for folder in folders for record in offline_records(folder))
        lines = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
        named = [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in line} for line in lines]
        return [{name: value for name, value in line.items() if not name.startswith("_")} for line in named]

    wait_until(lambda: len(read()) == count)
    return read()


@pytest.mark.filterwarnings("ignore")
def test_weights_and_biases_offline(tmp_path, monkeypatch, logger, caplog):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "of-mine")
    monkeypatch.chdir(tmp_path)
    run = run_and_resume(tmp_path / "run", "wandb")
    folders = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{run}"))
    assert len(folders) == 2
    history, config, names = history_of(folders, 3), {}, set()
    for record in (record for folder in folders for record in offline_records(folder)):
        is_run = record.WhichOneof("record_type") == "run"
        for update in record.run.config.update if is_run else record.config.update:
            config[update.key or update.nested_key[0]] = json.loads(update.value_json)
        if is_run:
            names.add((record.run.run_id, record.run.display_name, record.run.project))
    assert names == {(run, "run", "of-mine")}
    assert [line["step"] for line in history] == [1170, 1170, 2340]
    assert history[0].keys() == {"step", *TAGS} and history[2]["train/loss"] == 0.5
    assert config["train.epochs"] == 4 and config["dataset.augment"] == ["crop", "flip"]

    three, four = run_seeds(tmp_path / "seeds", "wandb")
    for one, loss in ((three, 1.0), (four, 2.0)):
        (folder,) = (tmp_path / "seeds" / "wandb").glob(f"offline-run-*-{one}")
        (line,) = history_of([folder], 1)
        assert line["train/loss"] == loss
    assert not warnings(caplog)


@pytest.mark.filterwarnings("ignore")
def test_mlflows_local_store(tmp_path, monkeypatch, logger, caplog):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of mine")
    run = run_and_resume(tmp_path / "run", "mlflow")
    client = mlflow.MlflowClient()
    found = client.get_run(run)
    assert client.get_experiment(found.info.experiment_id).name == "of mine"
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    assert found.data.params["train.batch_size"] == "32" and found.data.params["dataset.augment"] == "('crop', 'flip')"
    assert found.data.params["train.epochs"] == "3"  # which MLflow does not let change
    assert found.data.metrics.keys() == TAGS
    history = client.get_metric_history(run, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1170, 1.23456), (1170, 1.23456), (2340, 0.5)]

    runs = [client.get_run(one) for one in run_seeds(tmp_path / "seeds", "mlflow")]
    assert [one.info.run_name for one in runs] == ["seeds seed 3", "seeds seed 4"]
    assert [one.data.metrics for one in runs] == [{"train/loss": 1.0}, {"train/loss": 2.0}]
    assert {one.data.tags["group"] for one in runs} == {"seeds"}
    with pytest.raises(RuntimeError), MetricsLog(tmp_path / "run", 2340, ["mlflow"]):
        assert client.get_run(run).info.status == "RUNNING"
        raise RuntimeError
    assert client.get_run(run).info.status == "FAILED"
    assert not warnings(caplog)

    # A store that does not answer costs the run seconds, not more.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with MetricsLog(tmp_path / "run", 2340, ["mlflow"]) as log:
        log.write(LATER | {"step": 2341})
    (warning,) = warnings(caplog)
    assert warning.startswith("log.trackers: mlflow failed and is left out")


@pytest.mark.filterwarnings("ignore")
def test_trackios_data_base(tmp_path, monkeypatch, logger, caplog, capsys):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # it is read at the import
    monkeypatch.setenv("TRACKIO_PROJECT", "of-mine")
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    run = run_and_resume(tmp_path / "run", "trackio")
    assert storage.get_runs("of-mine") == [run] and run.startswith("run ")
    assert storage.get_run_config("of-mine", run)["train.batch_size"] == 32
    lines = storage.get_logs("of-mine", run)
    assert [(line["step"], line["train/loss"]) for line in lines] == [(1170, 1.23456), (1170, 1.23456), (2340, 0.5)]
    assert lines[0].keys() >= TAGS

    runs = run_seeds(tmp_path / "seeds", "trackio")
    assert [storage.get_logs("of-mine", one)[0]["train/loss"] for one in runs] == [1.0, 2.0]
    # Trackio's current run, which the next one would end, is left alone.
    assert sys.modules["trackio.context_vars"].current_run.get() is None
    assert not warnings(caplog) and capsys.readouterr().out == ""
