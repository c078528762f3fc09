"""Whole runs on streamed data: exact evaluation and resumption, devices, faults; a width-4 network at 16×16."""

import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

import helpers
from configs import rnn_photos as folder_config
from helpers import alive, checksums, children, wait_until
from helpers import metrics as read_lines
from programs import Program, in_float64, relative
from regnet_flax import main
from regnet_flax.data import augment
from regnet_flax.errors import ConfigError, DataError
from regnet_flax.modes import train as loop
from regnet_flax.modes.setup import datasets
from regnet_flax.training.trainer import take_seed

OPTIONS = {
    "model.name": "resnet8",
    "model.overrides.width": 4,
    "dataset.image_size": 16,
    "dataset.augment": ("random_resized_crop", "flip"),
    "train.batch_size": 4,
    "train.epochs": 2,
    "optimizer.learning_rate": 0.02,
    "optimizer.schedule": "constant",
    "eval.batch_size": 3,
    "eval.every_epochs": 2,
    "log.every_steps": 2,
}


def config_of(data, **overrides):
    config = folder_config.get_config()
    config.update_from_flattened_dict(OPTIONS | {"dataset.data_dir": str(data)} | overrides)
    return config


def train(data, workdir, devices=1, **overrides):
    return loop.train_and_evaluate(config_of(data, **overrides), workdir, devices=jax.devices()[:devices])


def arguments_of(data, workdir, **overrides):
    options = OPTIONS | {"dataset.data_dir": str(data)} | overrides
    return ["--config", "configs/rnn_photos.py", "--workdir", str(workdir)] + [
        f"--config.{name}={value}" for name, value in options.items()
    ]


@pytest.fixture(autouse=True, scope="module")
def _shallow():
    with helpers.shallow("resnet8"):
        yield


@pytest.fixture
def program_on(folder):
    """Makes a program on the folder: program_on(devices, **overrides)."""

    def make(devices=1, seeds=(), **overrides):
        config = config_of(folder, **overrides)
        return Program(config, datasets.open_dataset(config), jax.devices()[:devices], seeds=seeds)

    return make


def test_a_run_that_goes_on_at_step_3_ends_bitwise_as_an_uninterrupted_one(folder, tmp_path):
    """It resumes with a worker, which takes seconds to start. test_streaming.py compares the batches of two."""
    train(folder, tmp_path / "whole", **{"dataset.workers": 0})
    train(folder, tmp_path / "run", **{"train.max_steps": 3, "dataset.workers": 0})
    results = train(folder, tmp_path / "run", **{"dataset.workers": 1, "dataset.prefetch": 1})
    assert results["step"] == 6
    assert checksums(tmp_path / "run", 6) == checksums(tmp_path / "whole", 6)
    lines = {line["step"]: line for line in read_lines(tmp_path / "whole")}
    assert {6} <= {line["step"] for line in read_lines(tmp_path / "run")}
    assert read_lines(tmp_path / "run")[-1]["eval_loss"] == lines[6]["eval_loss"]


def test_a_program_reads_on_from_any_step(program_on):
    program = program_on()
    states = [program.initial_state()]
    for step in range(4):
        copy = jax.tree.map(lambda a: a.copy(), states[-1])
        states.append(program.train(copy, step, 1)[0])
    again, _ = program.train(jax.tree.map(lambda a: a.copy(), states[1]), 1, 1)
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(states[2].params), strict=True):
        np.testing.assert_array_equal(a, b)
    program.close()


def test_two_devices_train_as_one_and_share_batch_statistics_alike(program_on):
    """With accumulated batches, in float64, where another grouping of images would show."""

    def trained(devices):
        program = program_on(devices, **{"optimizer.accumulate_steps": 2, "dtype": "float64"})
        state = in_float64(program.initial_state())
        for step in range(2):
            state, _ = program.train(state, step, 1)
        program.close()
        return jax.device_get(state), program.evaluate(state)

    with jax.enable_x64(True):
        (one, metrics), (two, others) = trained(1), trained(2)
    for name in ("params", "batch_stats"):
        assert max(jax.tree.leaves(jax.tree.map(relative, getattr(two, name), getattr(one, name)))) < 1e-6, name
    assert metrics["count"] == others["count"] == 7
    assert metrics["loss"] == pytest.approx(others["loss"], rel=1e-6)


def test_several_seeds_on_streamed_data_train_as_they_would_alone(program_on):
    def trained(seeds, together="auto"):
        options = {"dtype": "float64", "seed": seeds[0], "compare.together": together}
        program = program_on(seeds=seeds, **options)
        state = in_float64(program.initial_state())
        for step in range(2):
            state, _ = program.train(state, step, 1)
        metrics = program.evaluate(state)
        program.close()
        return jax.device_get(state), metrics

    with jax.enable_x64(True):
        lone = {seed: trained((seed,)) for seed in (3, 0)}
        for together in ("never", "always"):
            states, metrics = trained((3, 0), together)
            for index, (seed, (alone, expected)) in enumerate(lone.items()):
                found = jax.device_get(take_seed(states, index))
                errors = jax.tree.map(relative, found.params, alone.params)
                assert max(jax.tree.leaves(errors)) < 1e-6, (together, seed)
                own = {name: value[index] for name, value in metrics.items()}
                assert own == pytest.approx(expected, rel=1e-6), (together, seed)


def test_evaluation_counts_every_photograph_that_decodes_once(folder, program_on):
    (folder / "val/b/17.jpg").write_bytes(b"no photograph")
    program = program_on()
    state = jax.device_get(program.initial_state())
    batch = program.dataset.eval_batches("test", 7)(0)
    kept = batch["mask"]
    assert kept.sum() == 6
    images = augment.normalize(batch["images"][kept], program.config.dataset.mean, program.config.dataset.std)
    apply = jax.jit(lambda variables, images: program.model.apply(variables, images, train=False))
    logits = np.asarray(apply({"params": state.params, "batch_stats": state.batch_stats}, images))
    losses = -np.asarray(jax.nn.log_softmax(logits))[np.arange(6), batch["labels"][kept]]
    accuracy = np.mean(logits.argmax(-1) == batch["labels"][kept])
    for batch_size, devices in ((1, 1), (3, 1), (5, 2), (100, 4)):
        metrics = program_on(devices, **{"eval.batch_size": batch_size}).evaluate(state)
        assert metrics["count"] == 6, (batch_size, devices)
        assert metrics["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
        assert metrics["accuracy"] == accuracy


def test_what_does_not_decode_is_said_once(folder, program_on, caplog, logger):
    path = folder / "train/a/04.jpg"
    path.write_bytes(b"no photograph")
    program = program_on()
    state = program.initial_state()
    for step in range(6):
        state, _ = program.train(state, step, 1)
    program.close()
    assert [r.message for r in caplog.records if "left out" in r.message] == [
        f"left out {path}: UnidentifiedImageError: cannot identify image file '{path}'"
    ]


def test_a_test_split_of_which_nothing_decodes(folder, program_on):
    for path in folder.glob("val/*/*"):
        path.write_bytes(b"no photograph")
    program = program_on()
    with pytest.raises(DataError, match="none of the 7 test images decodes"):
        program.evaluate(program.initial_state())


def test_a_run_resumes_neither_from_memory_nor_with_other_files(folder, tmp_path):
    options = {"dataset.augment": ("flip",), "train.max_steps": 1, "eval.every_epochs": 0}
    never = {"dataset.in_memory": "never"}
    train(folder, tmp_path / "run", **options | never)
    with pytest.raises(ConfigError, match="set dataset.in_memory=never, or name another") as caught:
        train(folder, tmp_path / "run", **options | {"train.max_steps": 2})
    assert "\n" not in str(caught.value)
    path = folder / "train/a/04.jpg"
    content = path.read_bytes()
    path.write_bytes(content + b" ")
    with pytest.raises(ConfigError, match="was trained on other images"):
        train(folder, tmp_path / "run", **options | never | {"train.max_steps": 2})
    path.write_bytes(content)
    assert train(folder, tmp_path / "run", **options | never | {"train.max_steps": 2})["step"] == 2


def test_a_stream_takes_one_step_a_call(folder, tmp_path):
    with pytest.raises(ConfigError, match="train.steps_per_call is 5: folder is streamed"):
        train(folder, tmp_path / "run", **{"train.steps_per_call": 5})


# The command line


def test_faults_are_one_line_and_exit_2(folder, tmp_path, capfd):
    def fails(code, **overrides):
        overrides |= {"train.batch_size": 8}  # one image per device
        assert main.main(arguments_of(folder, tmp_path / "run", **overrides)) == code
        (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    assert "dataset.in_memory is 'always'" in fails(2, **{"dataset.in_memory": "always"})
    assert "is not a directory" in fails(2, **{"dataset.data_dir": str(tmp_path / "nowhere")})
    (folder / "train/a/04.jpg").write_bytes(b"no photograph")
    assert "train/a/04.jpg does not decode" in fails(2, **{"dataset.strict": "True"})


@pytest.mark.slow
def test_a_dead_worker_ends_the_run_and_a_signal_stops_it_and_neither_leaves_a_process(folder, tmp_path):
    options = {"train.epochs": 2000, "eval.every_epochs": 0, "checkpoint.every_steps": 5, "dataset.workers": 2}
    command = [sys.executable, "-m", "regnet_flax.main", *arguments_of(folder, tmp_path / "run", **options)]
    env = os.environ | {"PYTHONPATH": str(loop.pathlib.Path(__file__).parents[1])}

    def start():
        process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        seen = lines_of(tmp_path / "run")
        wait_until(lambda: lines_of(tmp_path / "run") > seen + 3 or process.poll() is not None, 200)
        return process, children(process.pid)

    process, workers = start()
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 1
    assert errors.startswith("error: reading the data stopped") and errors.count("\n") == 1, errors
    assert not alive(workers)

    for number in (signal.SIGTERM, signal.SIGINT):
        process, workers = start()
        os.killpg(process.pid, number)  # to workers too, like a terminal or a batch system
        out, errors = process.communicate(timeout=100)
        assert process.returncode == 128 + number, errors
        assert "resuming from the checkpoint" in out and f"\n{number.name}: stopping after this step" in out, out
        assert errors.startswith(f"Stopped by {number.name}. Saved at step "), errors
        assert errors.count("\n") == 1
        assert len(workers) == 2 and not alive(workers)
    shutil.rmtree(tmp_path / "run")


def lines_of(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0
