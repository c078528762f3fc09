"""A network with regulators that starts from a plain network's weights computes the same as the plain one."""

import re

import jax
import numpy as np
import pytest

from comparison import compile_for, random_variables, relative
from helpers import run_program
from regnet_flax import create_model
from regnet_flax.config.fields import default_config
from regnet_flax.data.augment import normalize
from regnet_flax.data.sources import load_dataset
from regnet_flax.errors import ConfigError
from regnet_flax.modes.setup import models
from regnet_flax.port.torch import from_plain_torch, starts_from_plain, to_torch
from regnet_flax.port.weights import write_weights
from regnet_flax.trained import with_config
from regnet_flax.training.step import cross_entropy
from regnet_flax.training.trainer import _replaced

PAIRS = [
    ("se_preact_resnet20", "se_preact_regnet20_convlstm"),
    ("resnext50_32x4d", "regnext50_32x4d_convrnn"),
    ("resnet50", "regnet50_convrnn"),
    ("resnet20", "regnet20_convlstm"),
    ("wrn16_8", "wrn16_8_convrnn"),
    ("wide_resnet50_2", "wide_regnet50_2_convlstm"),
    ("resnet18", "regnet18_convlstm"),
]
DEFAULT = 2


def start(plain_name, name, size):
    """Returns the logits of a plain network with random weights, and of the regulated one that starts from it."""
    few = {"stage_sizes": (2, 1)}
    options = {"width": 4, "num_classes": 5}
    plain, model = (create_model(n, **options).clone(**few) for n in (plain_name, name))
    images = np.random.default_rng(0).normal(size=(4, size, size, 3)).astype(np.float32)
    shapes = jax.eval_shape(lambda: plain.init(jax.random.key(0), images, train=False))
    variables = random_variables(shapes, np.random.default_rng(1), np.float32)
    state = to_torch(variables, plain)
    assert starts_from_plain(state, model) and not starts_from_plain(state, plain)
    taken = from_plain_torch(state, model)

    @compile_for("float64")  # compiles faster
    def logits(variables, taken):
        found = dict(model.init(jax.random.key(2), images, train=False))
        found = {name: _replaced(found[name], taken[name]) for name in found}
        return plain.apply(variables, images, train=False), model.apply(found, images, train=False)

    return logits(variables, taken)


@pytest.mark.parametrize(
    "pair",
    [pytest.param(pair, marks=() if i < DEFAULT else pytest.mark.thorough) for i, pair in enumerate(PAIRS)],
    ids=lambda pair: pair[1],
)
def test_the_regulated_network_starts_as_the_plain_one(pair):
    expected, found = start(*pair, size=32 if "50" in pair[0] or "18" in pair[0] else 8)
    assert np.linalg.norm(expected) > 0.1
    assert relative(found, expected) < 1e-5


def test_the_program_starts_from_a_plain_networks_file(tmp_path):
    plain = create_model("resnet8", width=4)
    data = load_dataset("digits")
    images = np.asarray(normalize(data.test.images, *data.statistics()))
    shapes = jax.eval_shape(lambda: plain.init(jax.random.key(0), images[:1], train=False))
    variables = random_variables(shapes, np.random.default_rng(0), np.float32)
    write_weights(tmp_path / "plain.safetensors", to_torch(variables, plain))
    loss = cross_entropy(jax.jit(plain.apply)(variables, images), data.test.labels).mean()
    done = run_program(
        "--mode=eval",
        "--config.model.name=regnet8_convrnn",
        "--config.model.overrides.width=4",
        f"--config.model.init_from={tmp_path / 'plain.safetensors'}",
        "--workdir",
        tmp_path / "run",
        check=0,
    )
    said = done.stdout + done.stderr
    assert "all but the regulators" in said
    assert float(re.search(r"test loss ([\d.]+)", said)[1]) == pytest.approx(float(loss), abs=1e-4)


def test_another_place_of_the_stride_is_said(tmp_path, caplog, monkeypatch):
    """Names and shapes of torchvision's ResNet-50 fit, but its stride is in another convolution."""
    build_model = models.build_model
    monkeypatch.setattr(models, "build_model", lambda config: build_model(config).clone(stage_sizes=(1, 1)))
    config = default_config()
    config.update_from_flattened_dict({"model.name": "regnet50_convrnn", "dataset.num_classes": 10})
    config.model.overrides.width = 4
    plain = create_model("resnet50", width=4, bottleneck_stride="3x3").clone(stage_sizes=(1, 1))
    shapes = jax.eval_shape(lambda: plain.init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32)))
    state = to_torch(random_variables(shapes, np.random.default_rng(0), np.float32), plain)
    for metadata, words in (
        ({"bottleneck_stride": "3x3"}, "stride in the 3x3 convolution, but regnet50_convrnn has it in the 1x1"),
        ({}, "the 1x1 convolution is assumed (torchvision's have it in the 3x3)"),
        ({"bottleneck_stride": "1x1"}, ""),
    ):
        write_weights(tmp_path / "w.safetensors", state, metadata)
        config.model.init_from = str(tmp_path / "w.safetensors")
        caplog.clear()
        with caplog.at_level("WARNING", "regnet_flax"):
            assert "conv_fuse" in models.load_weights(config, 3)["params"]["stage1"]["block1"]
        assert words in caplog.text and bool(caplog.text) == bool(words)
    with pytest.raises(ConfigError, match="no regulators: regnet50_convrnn can be trained from it"):
        with_config(config, tmp_path)


def test_what_cannot_start_so():
    """A network in which the state replaces the features, and one of another kind."""
    assert not starts_from_plain({}, create_model("resnet_rnn20_convrnn"))
    assert not starts_from_plain({}, create_model("dia_resnet20"))


def test_a_regulated_network_that_fuses_nothing_is_not_taken_for_a_plain_one():
    assert starts_from_plain({"conv1.weight": 0}, create_model("regnet8_convlstm"))
    assert not starts_from_plain({"conv1.weight": 0}, create_model("regnet8_convlstm", regulated_stages=()))
    # A block of one's own that adds H.
    assert not starts_from_plain({"conv1.weight": 0, "regulator1.conv.weight": 0}, create_model("regnet8_convlstm"))
