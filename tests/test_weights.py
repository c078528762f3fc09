"""Files of weights: read, written, refused, and through the command line."""

import functools
import os

import jax
import numpy as np
import pytest
import torch

import helpers
from helpers import random_variables
from regnet_flax import create_model, main
from regnet_flax.config.fields import default_config
from regnet_flax.errors import WeightsError
from regnet_flax.models.registry import MODELS
from regnet_flax.models.regnet import RegNet
from regnet_flax.modes.setup import models
from regnet_flax.port.torch import from_torch, to_torch
from regnet_flax.port.weights import read_weights, write_weights

ARRAYS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float32([1.5])}
TINY = [
    "--config.model.name=regnet8_convrnn",
    "--config.model.overrides.width=4",
    "--config.train.batch_size=128",
    "--config.train.max_steps=2",
]


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])


@pytest.fixture(autouse=True, scope="module")
def _shallow():
    with helpers.shallow("resnet8", "regnet8_convrnn"):
        yield


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_round_trip(suffix, tmp_path):
    file = tmp_path / "deep" / f"w{suffix}"
    write_weights(file, ARRAYS, {"model": "x"})
    found, metadata = read_weights(file)
    assert found.keys() == ARRAYS.keys() and metadata == {"model": "x"}
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
    assert not list(file.parent.glob("*.part"))


@pytest.mark.parametrize("nest", ["state_dict", "model", "net", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_training_scripts_save(nest, dtype, tmp_path):
    state = {f"module.{name}": torch.from_numpy(array).to(dtype) for name, array in ARRAYS.items()}
    torch.save({nest: state, "epoch": 3} if nest else state, tmp_path / "w.pth")
    found, metadata = read_weights(tmp_path / "w.pth")
    assert metadata == {}
    for name, array in ARRAYS.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], array)


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.fault("a file of weights that runs code when it is unpickled")
def test_nothing_else_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Harm()}, "w.pth")
    with pytest.raises(WeightsError, match="weights only") as error:
        read_weights("w.pth")
    assert not (tmp_path / "harm").exists() and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("w.safetensors", b"\x08\0\0\0\0\0\0\0{}", "not a complete .safetensors"),
        ("w.safetensors", b"", "not a complete .safetensors"),
        ("w.pth", b"nothing", "cannot be read"),
        ("w.pth", b"", "cannot be read"),
        ("w.onnx", b"", "must end in"),
        ("missing.pth", None, "not a file"),
    ],
)
@pytest.mark.fault("a damaged file of weights")
def test_what_is_no_file_of_weights_is_one_line(name, content, words, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=words) as error:
        read_weights(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_a_pth_file_that_holds_no_state_dict(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="no state dict"):
        read_weights(tmp_path / "w.pth")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
        assert main.main([*TINY, "--workdir", str(workdir)]) == 0
    return workdir


def last_line(capsys, having=""):
    return [line for line in capsys.readouterr().out.splitlines() if having in line and line][-1]


@pytest.mark.parametrize(
    "kind, suffix", [("safetensors", ".safetensors"), pytest.param("torch", ".pth", marks=pytest.mark.thorough)]
)
def test_exported_and_evaluated_again(kind, suffix, trained, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main.main(["--mode=eval", "--workdir", str(trained), "--config.eval.checkpoint=last"]) == 0
    expected = last_line(capsys, "test loss")
    export = ["--mode=export", "--workdir", str(trained), "--config.eval.checkpoint=last"]
    assert main.main([*export, f"--config.export.format={kind}"]) == 0
    file = trained / f"weights{suffix}"
    assert str(file) in last_line(capsys)
    # The file says which model it is of, and how its images were normalised.
    evaluate = ["--mode=eval", f"--config.model.init_from={file}", "--workdir", str(tmp_path / "evaluated")]
    evaluate += ["--config.dataset.mean=(0.1,)", "--config.dataset.std=(0.5,)"]
    assert main.main(evaluate) == 0
    assert last_line(capsys, "test loss").partition(":")[2] == expected.partition(":")[2]
    assert main.main([*evaluate, "--config.model.new_head=True"]) == 2
    assert "there is nothing to evaluate" in capsys.readouterr().err
    _, metadata = read_weights(file)
    assert metadata["model"] == "regnet8_convrnn" and metadata["num_classes"] == "10"
    assert [path.name for path in tmp_path.iterdir()] == ["evaluated"]


def test_regulators_that_group_channels_otherwise_are_refused(tmp_path):
    config = default_config().lock()
    config.model.name, config.dataset.num_classes = "regnet8_convgru", 10
    config.model.overrides.width, config.model.overrides.regulator_grouping = 4, "contiguous"
    model = models.build_model(config)
    arrays = to_torch(random_variables(model, np.zeros((1, 8, 8, 3), np.float32)), model)
    config.model.init_from = str(tmp_path / "w.safetensors")
    write_weights(config.model.init_from, arrays, {"options": '{"regulator_grouping": "contiguous"}'})
    models.load_weights(config, 3)
    config.model.overrides.regulator_grouping = None
    with pytest.raises(WeightsError, match=r"set model.overrides.regulator_grouping=contiguous$"):
        models.load_weights(config, 3)
    for text in ("[", "[1]"):  # says nothing
        write_weights(config.model.init_from, arrays, {"options": text})
        models.load_weights(config, 3)


def test_only_text_is_read_from_the_facts_beside_a_file(tmp_path):
    write_weights(tmp_path / "w.pth", {"a": np.zeros(1, np.float32)}, {"model": "resnet8"})
    (tmp_path / "w.pth.json").write_text('{"step": 5, "model": "resnet8"}')
    assert read_weights(tmp_path / "w.pth")[1] == {"model": "resnet8"}


def test_training_starts_from_a_file_and_takes_a_new_head(tmp_path, capsys):
    model = create_model("resnet8", num_classes=7, width=4)
    variables = random_variables(model, np.zeros((1, 8, 8, 1), np.float32))
    write_weights(tmp_path / "w.safetensors", to_torch(variables, model))
    run = [
        *TINY,
        "--config.model.name=resnet8",
        "--workdir",
        str(tmp_path / "run"),
        f"--config.model.init_from={tmp_path / 'w.safetensors'}",
    ]
    # The step is so small that the weights do not change.
    run += ["--config.train.max_steps=1", "--config.optimizer.learning_rate=1e-12"]
    assert main.main(run) == 2
    error = capsys.readouterr().err
    assert "linear.weight has shape (7, 4), not (10, 4)" in error and "new_head" in error
    assert not (tmp_path / "run").exists()

    assert main.main([*run, "--config.model.new_head=True"]) == 0
    assert main.main(["--mode=export", "--workdir", str(tmp_path / "run")]) == 0
    found, _ = read_weights(tmp_path / "run" / "weights.safetensors")
    expected = to_torch({"params": variables["params"]}, model)
    for name, array in expected.items():
        if not name.startswith("linear."):
            np.testing.assert_allclose(found[name], array, atol=1e-6)
    assert found["linear.weight"].shape == (10, 4)


def test_a_head_may_be_left_out():
    model, other = (create_model("resnet8", num_classes=n, width=4) for n in (10, 7))
    variables = random_variables(other, np.zeros((1, 8, 8, 3), np.float32))
    found = from_torch(to_torch(variables, other), model, new_head=True)
    assert "head" not in found["params"] and found["params"].keys() | {"head"} == variables["params"].keys()


def test_the_stride_of_bottlenecks_is_said_or_checked(tmp_path, capsys, monkeypatch):
    small = MODELS["resnet50"].keywords | {"stage_sizes": (1, 1)}
    monkeypatch.setitem(MODELS, "resnet50", functools.partial(RegNet, **small))
    model = create_model("resnet50", width=4, bottleneck_stride="3x3")
    arrays = to_torch(random_variables(model, np.zeros((1, 8, 8, 1), np.float32)), model)
    write_weights(tmp_path / "w.safetensors", arrays, {"bottleneck_stride": "3x3"})
    command = ["--mode=eval", "--config.model.name=resnet50", "--config.model.overrides.width=4"]
    assert main.main([*command, f"--config.model.init_from={tmp_path / 'w.safetensors'}"]) == 2
    assert "bottleneck_stride=3x3" in capsys.readouterr().err
    write_weights(tmp_path / "plain.safetensors", arrays)
    assert main.main([*command, f"--config.model.init_from={tmp_path / 'plain.safetensors'}"]) == 0
    assert "the 1x1 convolution is assumed" in capsys.readouterr().out
