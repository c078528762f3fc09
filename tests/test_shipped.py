"""Weights that come with the package, by name."""

import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

import regnet_flax
from configs import digits
from helpers import error_of, run_program
from regnet_flax.errors import WeightsError, WorkdirError
from regnet_flax.models.registry import create_model
from regnet_flax.port import shipped
from regnet_flax.port.torch import to_torch
from regnet_flax.port.weights import read_weights, write_weights
from regnet_flax.trained import description
from regnet_flax.training.workdir import plain

NAMES = ("ant", "bee", "cat")


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A package with the weights "resnet8.insects"."""
    model = create_model("resnet8", width=4, num_classes=3)
    variables = model.init(jax.random.key(5), np.zeros((1, 8, 8, 3), np.float32), train=False)
    facts = {"class_names": NAMES, "image_shape": (8, 8, 3), "mean": [0.5], "std": [0.25], "options": {"width": 4}}
    metadata = {name: json.dumps(value) for name, value in facts.items()} | {"model": "resnet8", "step": "9"}
    write_weights(tmp_path / "package" / "resnet8.insects.safetensors", to_torch(variables, model), metadata)
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "package")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "package" / "resnet8.insects.safetensors"


def test_loaded_by_name(weights):
    assert regnet_flax.list_weights() == ["resnet8.insects"]
    trained, same = regnet_flax.load("resnet8.insects"), regnet_flax.load(weights)
    assert trained.class_names == NAMES and trained.step == 9 and trained.model == same.model
    images = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)
    np.testing.assert_array_equal(trained.predict(images), same.predict(images))
    with pytest.raises(WorkdirError, match="or one of the package's own: resnet8.insects"):
        regnet_flax.load("resnet8.beetles")
    with pytest.raises(WeightsError, match="or be one of the package's own: resnet8.insects"):
        read_weights("resnet8.beetles")


def test_weights_do_not_keep_how_their_run_computed(weights):
    arrays, metadata = read_weights(weights)
    write_weights(weights, arrays, metadata | {"options": '{"width": 4, "ops": "gpu", "remat": true}'})
    trained = regnet_flax.load(weights)
    overrides = trained.config.model.overrides
    assert (overrides.width, overrides.ops, overrides.remat) == (4, None, None) and trained.model.ops.name == "cpu"
    overrides.ops = "plain"
    assert json.loads(description(trained)["options"]) == {"width": 4}


def test_a_local_file_of_that_name_goes_first(weights):
    pathlib.Path("resnet8.insects").write_bytes(b"mine")
    with pytest.raises(WeightsError, match="resnet8.insects must end in"):
        read_weights("resnet8.insects")


def test_predicting_needs_neither_a_run_nor_the_models_name(weights, tmp_path):
    Image.new("RGB", (12, 8), (200, 0, 0)).save("a.png")
    command = ["--mode=predict", "--config.model.init_from=resnet8.insects", "--config.predict.images=a.png"]
    command.append("--config.model.overrides.shortcut=A")  # the file says better
    # What another run in the default workdir knows of its classes is not taken.
    workdir = pathlib.Path("runs/digits-regnet20_convlstm-0")
    workdir.mkdir(parents=True)
    config = {"class_names": [*"012"], "image_shape": [8, 8, 1], "dataset_fingerprint": ""}
    (workdir / "config.json").write_text(json.dumps(plain(digits.get_config()) | config))
    done = run_program(*command, "--config.predict.json=True", check=0)
    result = json.loads(done.stdout)
    assert result["model"] == "resnet8" and result["step"] == 9
    expected = regnet_flax.load("resnet8.insects").predict("a.png")[0]
    found = {entry["class"]: entry["probability"] for entry in result["predictions"][0]["top"]}
    np.testing.assert_allclose([found[name] for name in NAMES], expected, atol=1e-6)
    assert {path.name for path in workdir.iterdir()} == {"config.json"}
    assert pathlib.Path("runs/resnet8.insects/figures/predict.png").is_file()
    assert "model: name=resnet8, shortcut=None, width=4, as resnet8.insects says" in done.stderr
    line = error_of(run_program(*command[:1], "--config.model.init_from=resnet8.beetles", *command[2:]), 2)
    assert "or be one of the package's own: resnet8.insects" in line


def test_fine_tuning_starts_from_them(weights, tmp_path):
    command = ["--config.model.name=resnet8", "--config.model.overrides.width=4", "--config.train.max_steps=1"]
    command += ["--config.model.init_from=resnet8.insects", "--config.model.new_head=True"]
    command += ["--config.model.adapt_stem=True", "--config.optimizer.learning_rate=1e-12"]
    run_program(*command, "--config.eval.every_epochs=0", "--workdir", tmp_path / "run", check=0)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["init_from"] == "resnet8.insects"
    run_program("--mode=export", "--workdir", tmp_path / "run", check=0)
    found, start = read_weights(tmp_path / "run" / "weights.safetensors")[0], read_weights(weights)[0]
    np.testing.assert_allclose(found["layer1.0.conv1.weight"], start["layer1.0.conv1.weight"], atol=1e-6)
    np.testing.assert_allclose(found["conv1.weight"], start["conv1.weight"].sum(1, keepdims=True), atol=1e-6)
