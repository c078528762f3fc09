"""Files of weights from other programs."""

import argparse
import json
import os
import stat

import jax
import numpy as np
import pytest
import torch
from PIL import Image

from helpers import error_of, run_program
from regnet_flax import create_model
from regnet_flax.errors import WeightsError
from regnet_flax.port.torch import StemError, adapt_stem, check_stem, to_torch
from regnet_flax.port.weights import read_weights, write_weights

ARRAYS = {"conv1.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "bn1.bias": np.float32([1.5])}
TINY = ["--config.model.name=resnet8", "--config.model.overrides.width=4", "--config.train.batch_size=128"]


def tensors(prefix="", infix=""):
    return {prefix + name.replace(".", f".{infix}", 1): torch.from_numpy(a) for name, a in ARRAYS.items()}


def assert_read(path):
    found, _ = read_weights(path)
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (tensors("_orig_mod."), "without _orig_mod."),
        (tensors("_orig_mod.module."), "without _orig_mod., module."),
        (tensors("module._orig_mod."), "without _orig_mod., module."),
        (tensors(infix="_orig_mod."), "without _orig_mod."),
        (tensors("module.") | {"n_averaged": torch.tensor(3)}, "without n_averaged, module."),
        ({"state_dict": tensors("model."), "pytorch-lightning_version": "2"}, "without model."),
        (
            {"state_dict": tensors(), "state_dict_ema": tensors("module.")},
            "weights of state_dict_ema, not state_dict",
        ),
        ({"model": {"conv1.weight": torch.zeros(1)}, "model_ema": tensors()}, "the weights of model_ema, not model"),
        (tensors(), ""),
    ],
)
def test_names_that_wrappers_change_and_averages(content, said, tmp_path, logger, caplog):
    caplog.set_level("INFO", "regnet_flax")
    torch.save(content, tmp_path / "w.pth")
    assert_read(tmp_path / "w.pth")
    assert said in caplog.text and bool(said) == bool(caplog.text)


def test_all_weights_become_float32(tmp_path):
    from safetensors.torch import save_file

    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        save_file({name: t.to(dtype) for name, t in tensors().items()}, tmp_path / "w.safetensors")
        assert_read(tmp_path / "w.safetensors")


def test_suffixes_and_what_else_a_checkpoint_holds(tmp_path):
    for name in ("w.pth.tar", "w.ckpt", "pytorch_model.bin"):
        torch.save({"state_dict": tensors(), "epoch": 3}, tmp_path / name)
        assert_read(tmp_path / name)
    beside = {"args": argparse.Namespace(lr=1), "best": np.float64(0.5), "state_dict": tensors()}
    torch.save(beside, tmp_path / "checkpoint.ckpt")
    with pytest.raises(WeightsError) as caught:
        read_weights(tmp_path / "checkpoint.ckpt")
    message = str(caught.value)
    assert "it also holds argparse.Namespace, numpy" in message and message.isprintable()
    # As the message says.
    folder = os.getcwd()
    os.chdir(tmp_path)
    try:
        exec(message.rpartition(": ")[2], {"torch": torch})
    finally:
        os.chdir(folder)
    assert_read(tmp_path / "weights.pth")


def test_a_file_is_written_with_the_mode_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        write_weights(tmp_path / "w.safetensors", ARRAYS)
        write_weights(tmp_path / "w.pth", ARRAYS, {"model": "x"})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


def test_other_channels_are_adapted_or_refused():
    model, random = create_model("resnet8", width=4), np.random.default_rng(0)
    for have, want in ((3, 1), (1, 3)):
        arrays = {"conv1.weight": random.standard_normal((4, have, 3, 3), np.float32)}
        with pytest.raises(StemError, match=rf"conv1.weight has shape \(4, {have}, 3, 3\), for images of {have}"):
            check_stem(arrays, model, want)
        adapted = adapt_stem(arrays, model, want)
        check_stem(adapted, model, want)
        patch = random.standard_normal((1, 3, 3), np.float32)  # grey, in one channel or three equal ones
        expected, found = ((a["conv1.weight"] * patch).sum((1, 2, 3)) for a in (arrays, adapted))
        np.testing.assert_allclose(found, expected, atol=1e-5)
    three = {"conv1.weight": np.zeros((4, 4, 3, 3), np.float32)}
    assert adapt_stem(three, model, 3) == three  # there is no rule for four channels


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Weights for colour images and 10 classes, for a resnet8 of width 4."""
    file = tmp_path_factory.mktemp("start") / "w.safetensors"
    model = create_model("resnet8", width=4)
    variables = model.init(jax.random.key(5), np.zeros((1, 8, 8, 3), np.float32), train=False)
    write_weights(file, to_torch(variables, model))
    return file


def test_fine_tuning_from_colour_weights_is_resumed_without_them(start, tmp_path):
    command = [*TINY, "--workdir", tmp_path / "run", f"--config.model.init_from={tmp_path / 'w.safetensors'}"]
    command.append("--config.eval.every_epochs=0")
    line = error_of(run_program(*command), 2)
    assert "is not a file" in line
    write_weights(tmp_path / "w.safetensors", {"conv1.weight": np.ones((4, 1, 3, 3), np.int8)})
    assert "conv1.weight is int8, so the weights look quantised" in error_of(run_program(*command), 2)
    (tmp_path / "w.safetensors").write_bytes(start.read_bytes())
    line = error_of(run_program(*command), 2)
    assert "conv1.weight has shape (4, 3, 3, 3)" in line and "(4, 1, 3, 3)" in line and "model.adapt_stem=True" in line
    assert not (tmp_path / "run").exists()
    command.append("--config.model.adapt_stem=True")
    run_program(*command, "--config.train.max_steps=1", check=0)
    (tmp_path / "w.safetensors").unlink()
    assert "resuming from" in run_program(*command, "--config.train.max_steps=2", check=0).stdout

    # Prediction and export work with the run's own weights, or with those of a file.
    mode = ["--workdir", tmp_path / "run", f"--config.export.path={tmp_path / 'mine.safetensors'}"]
    run_program("--mode=export", *mode, check=0)  # the last checkpoint, because none was evaluated
    own, metadata = read_weights(tmp_path / "mine.safetensors")
    assert json.loads(metadata["class_names"]) == [*"0123456789"] and metadata["step"] == "2"
    mode[-1] = f"--config.export.path={tmp_path / 'other.safetensors'}"
    other = ["--config.model.adapt_stem=True", f"--config.model.init_from={start}"]
    done = run_program("--mode=export", *mode, *other, check=0)
    assert "resnet8, w.safetensors" in done.stdout
    found = read_weights(tmp_path / "other.safetensors")[0]
    np.testing.assert_allclose(found["conv1.weight"], read_weights(start)[0]["conv1.weight"].sum(1, keepdims=True))
    assert not np.allclose(found["conv1.weight"], own["conv1.weight"])


@pytest.mark.parametrize("described", [True, False])
def test_a_file_of_weights_predicts_without_a_run(described, tmp_path):
    model = create_model("resnet8", width=4, num_classes=3 if described else 10)
    variables = model.init(jax.random.key(5), np.zeros((1, 8, 8, 1), np.float32), train=False)
    about = {"class_names": ["ant", "bee", "cat"], "image_shape": [8, 8, 1], "mean": [0.5], "std": [0.5]}
    metadata = {name: json.dumps(value) for name, value in about.items()} if described else {}
    write_weights(tmp_path / "w.safetensors", to_torch(variables, model), metadata)
    Image.new("L", (8, 8), 200).save(tmp_path / "a.png")
    command = ["--mode=predict", *TINY, f"--config.model.init_from={tmp_path / 'w.safetensors'}"]
    command += [f"--config.predict.images={tmp_path / 'a.png'}", "--workdir", tmp_path / "none"]
    done = run_program(*command, "--config.predict.json=True", "--config.predict.top=20", check=0)
    result = json.loads(done.stdout)
    names = {entry["class"] for entry in result["predictions"][0]["top"]}
    assert names == ({"ant", "bee", "cat"} if described else {*"0123456789"})
    assert result["chosen"] == "w.safetensors"
    (tmp_path / "w.safetensors").unlink()
    assert "w.safetensors is not a file" in error_of(run_program(*command), 2)
