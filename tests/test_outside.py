"""A custom regulator: registered, trained, evaluated, exported, inspected and compared from outside the package."""

import json
import pathlib
import sys
import tarfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import regnet_flax
from helpers import few_digits
from regnet_flax import create_model, list_models, main, register_regulator
from regnet_flax.analysis import features
from regnet_flax.analysis.plots import features as figures
from regnet_flax.analysis.summary import summarize
from regnet_flax.errors import ConfigError, DataError, InputError, WorkdirError
from regnet_flax.models.registry import MODELS
from regnet_flax.models.regnet import CELLS
from regnet_flax.models.regulators import REGULATORS, Regulator
from regnet_flax.port.torch import from_torch, to_torch
from regnet_flax.port.weights import read_weights

STORED = pathlib.Path(__file__).parent / "stored"
LEAKY = """
import flax.linen as nn
from regnet_flax import register_regulator
from regnet_flax.models.regulators import Regulator


@register_regulator("leaky")
class Leaky(Regulator):
    gate_names = ("z", "h")

    def step(self, x, state, weights):
        (h,) = state
        z, candidate = self.convolve(x, h, weights, 0, 2)
        gates = {"z": nn.sigmoid(z), "h": nn.relu(candidate)}
        rate = self.param("rate", nn.initializers.constant(0.5), (self.features,))
        leak = self.param("leak", nn.initializers.constant(0.9), ())
        return (leak * gates["z"] * h + rate * gates["h"],), gates
"""


@pytest.fixture(autouse=True)
def registered_nowhere_else(monkeypatch):
    """Undoes what a test registers and imports."""
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
    monkeypatch.setattr(sys, "path", list(sys.path))
    tables = [(table, dict(table)) for table in (MODELS, CELLS, REGULATORS)]
    modules = set(sys.modules)
    yield
    for table, before in tables:
        table.clear()
        table.update(before)
    for name in set(sys.modules) - modules:
        if name.startswith("my_"):
            del sys.modules[name]


def test_a_cell_of_ones_own_from_the_command_line_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_cells.py").write_text(LEAKY)
    plugins = "--config.model.plugins=('my_cells',)"
    small = ["--config.model.overrides.width=4", "--config.train.batch_size=32", "--config.train.epochs=1"]

    assert main.main(["--config.model.name=regnet8_leaky", *small]) == 2
    assert "'regnet8_leaky'" in capsys.readouterr().err
    assert main.main(["--mode=summary", plugins, "--config.model.name=regnet8_leaky", *small]) == 0
    assert "regnet8_leaky, images of 8×8×1" in capsys.readouterr().out
    assert {"regnet20_leaky", "se_regnet50_leaky"} <= set(list_models("*leaky")) and len(list_models("*leaky")) == 18

    # A comparison trains it and writes a report.
    compare = ["--mode=compare", "--config=configs/compare_digits.py", plugins, *small, "--config.train.epochs=1"]
    compare += ["--config.compare.models=('regnet8_leaky',)", "--config.compare.seeds=(3,)"]
    with few_digits():
        assert main.main([*compare, "--workdir=all"]) == 0
    assert "| regnet8_leaky | Leaky |" in (tmp_path / "all/report.md").read_text()
    workdir = tmp_path / "all" / "regnet8_leaky"

    # The workdir names the module to import, in a process that has not imported it.
    monkeypatch.undo()
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
    monkeypatch.syspath_prepend(tmp_path)
    del sys.modules["my_cells"]
    for table in (MODELS, CELLS, REGULATORS):
        for name in [name for name in table if "leaky" in name]:
            del table[name]
    trained = regnet_flax.load(workdir, "last")
    assert json.loads((workdir / "config.json").read_text())["model"]["plugins"] == ["my_cells"]
    assert main.main(["--mode=export", "--workdir", str(workdir)]) == 0
    arrays, metadata = read_weights(workdir / "weights.safetensors")
    assert metadata["model"] == "regnet8_leaky" and arrays["regulator1.rate"].shape == (4,)
    assert arrays["regulator1.leak"].shape == ()
    back = from_torch(arrays, trained.model)
    jax.tree.map(np.testing.assert_array_equal, back, jax.device_get(trained.variables))
    card = (workdir / "README.md").read_text()
    assert "import my_cells  # registers the model" in card and "It uses my_cells. Other RegNets" in card

    # Inside.
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)
    blocks = features.inspect(trained.model, trained.variables, images / np.float32(255))
    assert [block.name for block in blocks] == ["1.1", "2.1", "3.1"]
    assert all(list(block.gates) == ["z", "h"] and list(block.state) == ["H"] for block in blocks)
    figures.gates(blocks, tmp_path / "gates.png")
    figures.state(blocks, tmp_path / "state.png")
    assert np.asarray(Image.open(tmp_path / "gates.png")).std() > 0


@pytest.mark.parametrize("kernel", ["separable", "dense"])
def test_a_cell_may_convolve_what_is_wider_than_its_dtype(kernel):
    @regnet_flax.register_regulator("wide")
    class Wide(Regulator):
        gate_names = ("f", "h")

        def step(self, x, state, weights):
            (h,) = state
            (f,) = self.convolve(x, h, weights, 0, 1)
            (g,) = self.convolve(x, jax.nn.sigmoid(f) * h, weights, 1, 2)
            own = self.conv3x3(h.astype(jnp.float32), self.param("own", jax.nn.initializers.ones, (3, 3, 4, 4)))
            assert f.dtype == g.dtype == jnp.float32
            return (jnp.tanh(g) + own,), {"f": f, "h": g}

    model = regnet_flax.create_model("regnet8_wide", num_classes=3, width=4, kernel=kernel, dtype=jnp.bfloat16)
    model = model.clone(stage_sizes=(2,))
    images = jnp.ones((1, 8, 8, 3))
    assert jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), images)[0]).shape == (1, 3)


@pytest.mark.fault("a module of model.plugins that cannot be imported")
def test_a_plugin_that_cannot_be_imported_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, body, words in [
        ("my_none", None, ["'my_none'", "ModuleNotFoundError"]),
        ("my_bad", "1 / 0", ["'my_bad'", "ZeroDivisionError"]),
        ("my_exit", "raise SystemExit(3)", ["'my_exit'", "SystemExit"]),
        ("my_gru", LEAKY.replace('"leaky"', '"convgru"', 1), ["'my_gru'", "convgru", "exists already"]),
    ]:
        if body is not None:
            (tmp_path / f"{name}.py").write_text(body)
        assert main.main([f"--config.model.plugins=('{name}',)", "--config.model.name=regnet8_leaky"]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: model.plugins: ") and all(word in line for word in words), line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "cell", "words"),
    [
        ("convgru", Regulator, "exists already"),
        ("replacing_convgru", Regulator, "exists already"),
        ("my cell", Regulator, "identifier"),
        ("2cells", Regulator, "identifier"),
        ("", Regulator, "identifier"),
        ("über", Regulator, "identifier"),
        ("cell", nn.Module, "subclass"),
        ("cell", lambda: None, "subclass"),
    ],
)
def test_what_cannot_be_registered(name, cell, words):
    before = dict(CELLS), dict(MODELS)
    with pytest.raises(ValueError, match=words):
        register_regulator(name)(cell)
    with pytest.raises(ValueError, match="mycell"):
        register_regulator(Regulator)  # the parentheses are missing
    assert (CELLS, MODELS) == before


class Own(Regulator):
    """A cell with its own weights, in its own `__call__`."""

    gate_names = ("a",)

    @nn.compact
    def __call__(self, x, state):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (self.features, self.features))
        scale = self.param("scale", nn.initializers.ones, (self.features,))
        mixed = nn.Conv(self.features, (3, 3), use_bias=False, name="mix")(state[0])
        a = nn.sigmoid(x @ kernel) * scale
        return (a * mixed,), {"a": a}


def test_weights_of_ones_own_are_counted_and_ported():
    register_regulator("own")(Own)
    model = create_model("regnet14_own", width=4, num_classes=3)
    images = jnp.ones((1, 8, 8, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    random = np.random.default_rng(0)
    variables = jax.tree.map(lambda a: random.standard_normal(a.shape, np.float32), shapes)
    arrays = to_torch(variables, model)
    assert {"regulator1.kernel", "regulator1.scale", "regulator1.mix.weight"} <= arrays.keys()
    assert arrays["regulator2.mix.weight"].shape == (8, 8, 3, 3)
    jax.tree.map(np.testing.assert_array_equal, from_torch(arrays, model), variables)
    plain = {part.name: part for part in summarize(create_model("regnet14_convrnn", width=4), (8, 8, 3))}
    own = {part.name: part for part in summarize(model, (8, 8, 3))}
    # Two blocks of 8×8 pixels: a dense layer and a 3×3 convolution instead of 11 per channel.
    assert own["stage1"].multiply_adds - plain["stage1"].multiply_adds == 2 * 64 * (16 + 9 * 16 - 11 * 4)


class Normalized(Regulator):
    gate_names = ("h",)

    def step(self, x, state, weights):
        (a,) = self.convolve(x, state[0], weights, 0, 1)
        a = nn.BatchNorm(use_running_average=not self.is_mutable_collection("batch_stats"), name="bn")(a)
        return (jnp.tanh(a),), {"h": jnp.tanh(a)}


class Dropped(Regulator):
    gate_names = ("h",)

    def step(self, x, state, weights):
        (a,) = self.convolve(x, state[0], weights, 0, 1)
        h = nn.Dropout(0.5, deterministic=False)(jnp.tanh(a))
        return (h,), {"h": h}


@pytest.mark.fault("a regulator with dropout, or a shared one with batch statistics")
def test_what_a_stage_cannot_give_is_refused_and_says_why():
    register_regulator("normalized")(Normalized)
    register_regulator("dropped")(Dropped)
    images = jnp.ones((2, 8, 8, 3))

    def refused(name, **options):
        with pytest.raises(InputError) as caught:
            jax.eval_shape(create_model(name, width=4, **options).init, jax.random.key(0), images)
        return str(caught.value)

    message = refused("regnet14_normalized")
    assert "Normalized keeps batch_stats" in message and "share_regulator=False" in message and "\n" not in message
    for shared in (True, False):
        assert "Dropped draws random numbers" in refused("regnet8_dropped", share_regulator=shared)

    # Each block has its own statistics, even under the scan; training updates them, and evaluation reads them.
    model = create_model("regnet20_normalized", width=4, share_regulator=False).clone(stage_sizes=(3,))

    @jax.jit
    def all_of_it(images):
        variables = model.init(jax.random.key(0), images)
        _, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return variables["batch_stats"], updates["batch_stats"], model.apply(variables, images)

    before, after, logits = all_of_it(images)
    means = [stats["stage1"]["blocks"]["regulator"]["bn"]["mean"] for stats in (before, after)]
    assert means[0].shape == (2, 4) and not np.array_equal(*means) and logits.shape == (2, 10)


# load


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Workdirs of an earlier version, whose config.json lacks some of today's fields and has others."""
    folder = tmp_path_factory.mktemp("stored")
    for name in ("lone", "seeds"):
        with tarfile.open(STORED / f"{name}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    path = folder / "lone" / "config.json"
    config = json.loads(path.read_text())
    config["model"]["overrides"] |= {"before": False}
    path.write_text(json.dumps(config))
    return folder


def test_a_loaded_model_predicts(stored, tmp_path, caplog, logger):
    trained = regnet_flax.load(stored / "lone", "last")
    assert "model.overrides.before=False, which this version does not know" in caplog.text
    assert trained.step == 13 and trained.class_names == tuple("0123456789") and trained.image_shape == (8, 8, 1)
    assert trained.config.model.name == "regnet8_convlstm" and trained.config.model.plugins == ()
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 1), np.uint8)
    mean, std = trained.config.dataset.mean, trained.config.dataset.std
    normal = (images / np.float32(255) - np.float32(mean)) / np.float32(std)
    expected = jax.nn.softmax(jax.jit(trained.model.apply)(trained.variables, normal))
    found = trained.predict(images)
    assert found.dtype == np.float32 and found.shape == (7, 10)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(trained.predict(images[0]), expected[:1], atol=1e-5)

    # Images of another size and colour are resized the same way as arrays and as files.
    large = np.random.default_rng(1).integers(0, 256, (2, 24, 20, 3), np.uint8)
    files = [tmp_path / f"{number}.png" for number in range(2)]
    for file, pixels in zip(files, large, strict=True):
        Image.fromarray(pixels).save(file)
    np.testing.assert_allclose(trained.predict(files), trained.predict(large), atol=1e-6)
    np.testing.assert_allclose(trained.predict(str(files[1])), trained.predict(large)[1:], atol=1e-6)
    assert trained.predict([]).shape == (0, 10)
    with pytest.raises(ValueError, match=r"float64 of shape \(2,\)"):
        trained.predict(np.zeros(2))
    with pytest.raises(DataError, match=r"none\.png cannot be read"):
        trained.predict(tmp_path / "none.png")


def test_one_of_several_seeds_is_loaded(stored):
    first, other = (regnet_flax.load(stored / "seeds", 13, seed=seed) for seed in (None, 0))
    assert (first.config.seed, other.config.seed) == (3, 0)
    kernels = [trained.variables["params"]["conv1"]["kernel"] for trained in (first, other)]
    assert kernels[0].shape == (3, 3, 1, 4) and not np.array_equal(*kernels)
    with pytest.raises(ConfigError, match="seed is 5: .* has the seeds 3, 0"):
        regnet_flax.load(stored / "seeds", seed=5)


def test_what_cannot_be_loaded_is_one_line(stored):
    with pytest.raises(WorkdirError, match="resnet20 has no config.json"):
        regnet_flax.load("resnet20")
    with pytest.raises(ConfigError, match="seed is 5"):
        regnet_flax.load(stored / "lone", seed=5)
    with pytest.raises(ConfigError, match="eval.checkpoint is 'newest'"):
        regnet_flax.load(stored / "lone", "newest")
