"""Two processes with two CPU devices each, on one machine, against one process with four."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from helpers import checksums, tiny_config
from regnet_flax import main
from regnet_flax.modes import train as loop
from regnet_flax.modes.setup.models import load_trained
from regnet_flax.training import parallel
from regnet_flax.training.checkpoint import CHECKPOINTS
from regnet_flax.training.parallel import AXIS

ROOT = pathlib.Path(__file__).resolve().parents[1]
FIELDS = {  # 360 test images do not divide into batches of 56, and process 1 has no image of the last batch
    "model.name": "resnet8",
    "train.batch_size": 128,
    "train.max_steps": 6,
    "optimizer.warmup_epochs": 3.0,
    "dataset.augment": ("crop", "flip"),
    "eval.batch_size": 56,
    "log.every_steps": 3,
    "checkpoint.every_steps": 3,
}


def free_port(ports=(0,)):
    """Returns a free port from `ports`; 0 means any."""
    for port in ports:
        with contextlib.suppress(OSError), socket.socket() as found:
            found.bind(("localhost", port))
            return found.getsockname()[1]
    raise OSError("no port is free")


def slurm():
    """Returns the variables that Slurm sets for each of two tasks."""
    port = free_port(range(61440, 65536))  # JAX picks one of these by the job's number
    job = {"SLURM_JOB_ID": str(port - 61440), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    return [job | {"SLURM_PROCID": index, "SLURM_LOCALID": index} for index in ("0", "1")]


def start(workdir, *arguments, each=((), ()), tasks=None, **fields):
    """Starts both processes; `each` has more arguments for each, `tasks` the variables of a cluster."""
    port = free_port()
    fields = {"model.overrides.width": 4, "train.epochs": 3} | FIELDS | fields
    command = [sys.executable, "-m", "regnet_flax.main", f"--workdir={workdir}", *arguments]
    command += [f"--config.{field}={value}" for field, value in fields.items()]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "2"}
    return [
        subprocess.Popen(
            [*command, *each[index], "--distributed=auto" if tasks else f"--distributed=localhost:{port},2,{index}"],
            cwd=ROOT,
            env=environment | (tasks[index] if tasks else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]


def finish(processes, code):
    """Returns standard output and error of both, without Gloo's and JAX's own lines."""
    outputs = []
    try:
        for process in processes:
            out, errors = process.communicate(timeout=400)
            outputs.append([re.sub(r"(?m)^(W\d{4}|.*\[Gloo\]|.*peer ranks).*\n", "", text) for text in (out, errors)])
    finally:
        for process in processes:
            process.kill()
    print(*[text for texts in outputs for text in texts], sep="\n--\n")  # pytest shows it on failure
    assert [process.returncode for process in processes] == [code, code]
    return outputs


def params(workdir, step="last"):
    config = tiny_config(**FIELDS | {"eval.checkpoint": step, "dataset.num_classes": 10})
    _, variables, step = load_trained(config, workdir)
    return variables, step


def metrics(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A finished run of both processes, and their output."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    return workdir, finish(start(workdir), 0)


@pytest.mark.thorough
def test_two_processes_train_to_the_parameters_of_one(two, tmp_path):
    workdir, _ = two
    expected = loop.train_and_evaluate(tiny_config(**FIELDS), tmp_path, devices=jax.devices()[:4])
    assert params(workdir)[1] == 6
    # Each step in float32 amplifies rounding; a missing reduction shows in the first digits.
    (variables, _), (one, _) = params(workdir, "3"), params(tmp_path, "3")
    for path, array in jax.tree_util.tree_leaves_with_path(variables):
        other = one
        for key in path:
            other = other[key.key]
        np.testing.assert_allclose(array, other, rtol=5e-3, atol=2e-4, err_msg=jax.tree_util.keystr(path))
    found = json.loads((workdir / "results.json").read_text())
    assert (found["hardware"]["processes"], found["hardware"]["devices"]) == (2, 4)
    assert found["last"]["eval_accuracy"] == pytest.approx(expected["last"]["eval_accuracy"], abs=0.02)
    assert len(metrics(workdir)) == 2
    for line, other in zip(metrics(workdir), metrics(tmp_path), strict=True):
        assert line == pytest.approx(other, rel=1e-2, abs=0.01)


@pytest.mark.thorough
def test_only_process_0_writes(two):
    workdir, ((first, _), (second, errors)) = two
    assert "test accuracy" in first and (second, errors) == ("", "")
    assert len(list(workdir.glob("events.out.tfevents*"))) == 1
    assert (workdir / "figures" / "curves.png").exists()
    log = (workdir / "train.log").read_text()
    assert log.count("train loss") == 2 and log.count("results: ") == 1


@pytest.mark.slow
def test_what_is_streamed_is_read_in_parts_and_trains_to_the_same_parameters(tmp_path):
    """Nine test images do not divide by the processes or the devices."""
    rng = np.random.default_rng(0)
    for name, count in (("train/one", 9), ("train/two", 8), ("test/one", 5), ("test/two", 4)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(count):
            image = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
            image.save(tmp_path / "data" / name / f"{index}.png")
    fields = {"dataset.name": "folder", "dataset.data_dir": str(tmp_path / "data"), "dataset.in_memory": "never"}
    fields |= {"dataset.image_size": 16, "dataset.augment": ("random_resized_crop", "flip"), "train.batch_size": 8}
    fields |= {"train.mixup": 0.2, "eval.batch_size": 4, "train.max_steps": 3}
    finish(start(tmp_path / "two", **fields), 0)
    loop.train_and_evaluate(tiny_config(**FIELDS | fields), tmp_path / "one", devices=jax.devices()[:4])
    for line, other in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert line == pytest.approx(other, rel=1e-4)
    fields |= {"eval.checkpoint": "last", "dataset.num_classes": 2}
    found = [load_trained(tiny_config(**FIELDS | fields), tmp_path / name)[1] for name in ("two", "one")]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *found)


@pytest.mark.slow
def test_two_tasks_of_slurm_evaluate_every_image_once(two):
    workdir, _ = two
    (out, _), (second, _) = finish(start(workdir, "--mode=eval", tasks=slurm(), **{"eval.batch_size": 100}), 0)
    accuracy = json.loads((workdir / "results.json").read_text())["last"]["eval_accuracy"]
    assert f"accuracy {100 * accuracy:.2f} %" in out and "over 360 images" in out and not second


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_a_signal_to_one_saves_at_one_step_and_stops_both(two, tmp_path, index):
    workdir, _ = two
    run = tmp_path / "run"
    shutil.copytree(workdir, run)
    (run / "results.json").unlink()
    long = {"train.max_steps": 33, "log.every_steps": 0, "checkpoint.every_steps": 1}
    processes = start(run, **long)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (run / CHECKPOINTS / "8").exists():
        time.sleep(0.005)
    processes[index].send_signal(signal.SIGTERM)
    errors = [errors.splitlines()[-1] for _, errors in finish(processes, 143)]
    assert errors[0] == errors[1] and "Saved at step" in errors[0]
    step = int(re.search(r"step (\d+)", errors[0])[1])
    assert step == max(int(path.name) for path in (run / CHECKPOINTS).iterdir() if path.name.isdigit())
    assert 8 <= step < 33, "the run ended before the signal came"

    out = finish(start(run, **long), 0)[0][0]
    assert f"resuming from the checkpoint at step {step} of 33" in out
    whole = tmp_path / "whole"
    finish(start(whole, **long), 0)
    assert checksums(run, 33) == checksums(whole, 33)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_by_both(two, tmp_path):
    workdir, _ = two
    run = tmp_path / "run"
    shutil.copytree(workdir, run)
    (run / "results.json").unlink()
    shutil.rmtree(run / CHECKPOINTS / "6" / "state" / "d")
    (out, _), (second, _) = finish(start(run), 0)
    assert "checkpoint 6 is damaged" in out and "resuming from the checkpoint at step 3" in out
    assert "checkpoint 6 is damaged" in second
    assert (run / CHECKPOINTS / "damaged" / "6").is_dir()
    assert checksums(run, 6) == checksums(workdir, 6)


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_what_fails_in_one_process_fails_in_both_in_one_line(failing, tmp_path):
    for name in ("train/one", "train/two", "test/one", "test/two"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / "image.png")
    each = [[f"--config.dataset.data_dir={tmp_path / 'data'}"]] * 2
    each[failing] = ["--config.dataset.data_dir=missing"]
    outputs = finish(start(tmp_path / "run", "--config=configs/rnn_photos.py", each=each, **{"train.epochs": 150}), 2)
    own, other = outputs[failing][1], outputs[1 - failing][1]
    assert own.startswith("error: ") and "missing" in own and own.count("\n") == 1
    assert f"process {failing} failed" in other and other.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_with_other_configs_are_refused(tmp_path):
    each = [(), ("--config.optimizer.momentum=0.8",)]
    (_, first), (_, second) = finish(start(tmp_path / "run", each=each), 2)
    assert "process 1 has another config" in second and "process 1 failed" in first
    assert first.count("\n") == second.count("\n") == 1


@pytest.mark.slow
def test_a_workdir_in_use_is_refused_by_both(two):
    from regnet_flax.training.workdir import workdir_lock

    workdir, _ = two
    with workdir_lock(workdir):
        (_, first), (_, second) = finish(start(workdir, **{"train.max_steps": 7}), 2)
    assert first.count("\n") == 1 and f"process {os.getpid()}" in first
    assert second.count("\n") == 1 and "process 0 failed" in second


def test_no_cluster_around_is_one_line(program, tmp_path):
    done = program("--distributed=auto", cwd=tmp_path, check=2)
    assert done.stderr.count("\n") == 1 and "HOST:PORT,PROCESSES,INDEX" in done.stderr


@pytest.mark.parametrize("where", ["1234", "node1:1234,2,2", "node1:1234,2"])
def test_a_place_that_cannot_be_is_one_line(where, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.main([f"--distributed={where}"]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert "HOST:PORT,PROCESSES,INDEX" in error


def test_shard_map_is_what_pmap_is():
    """Tests shard_map, which several processes use, on the devices of one process."""
    devices = jax.devices()[:4]

    def function(total, part, scale):
        return total + jax.lax.psum(part["x"] * scale, AXIS)

    arguments = jnp.arange(3.0), {"x": jnp.arange(12.0).reshape(4, 3)}, 2.0
    found = parallel.shard_map(function, (None, 0, None), devices)(*arguments)
    np.testing.assert_array_equal(found, parallel.pmap(function, (None, 0, None), devices)(*arguments))
    np.testing.assert_array_equal(found, [36.0, 45.0, 54.0])
