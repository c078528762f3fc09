"""The analyses: readouts of the last blocks, blocks side by side, the use of H, Grad-CAM, and their mode."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import pyplot as plt

from helpers import run_program
from regnet_flax import create_model
from regnet_flax.analysis import features, grad_cam, readout, state_use
from regnet_flax.analysis.plots import probes


def made(name, seed=0, **options):
    """Makes a small model with variables other than its initial ones, and six images."""
    model = create_model(name, num_classes=10, width=4, **options).clone(stage_sizes=(1, 2))
    images = jax.random.normal(jax.random.key(seed), (6, 8, 8, 3))
    variables = jax.jit(lambda key: model.init(key, images, train=False))(jax.random.key(seed))
    keys = iter(jax.random.split(jax.random.key(seed + 1), 1000))
    variables = jax.tree.map(lambda a: a + 0.1 * jax.random.uniform(next(keys), a.shape), variables)
    return model, variables, images


@pytest.mark.parametrize("name", ["regnet8_convrnn", pytest.param("preact_resnet8", marks=pytest.mark.thorough)])
def test_readouts_use_the_last_layer_and_end_with_the_networks_own_accuracy(name):
    model, variables, images = made(name)
    logits = jax.jit(model.apply)(variables, images)
    labels = np.array(logits.argmax(-1))
    labels[4:] = (labels[4:] + 1) % 10
    found = readout.readouts(model, variables, images, labels)
    assert list(found) == ["2.1", "2.2"] and found["2.2"] == pytest.approx(4 / 6)
    if name.startswith("preact"):
        return  # whose last block's output is normalised before the head

    (block,) = (block for block in features.inspect(model, variables, images) if block.name == "2.1")
    head = variables["params"]["head"]
    expected = (block.output.mean((1, 2)) @ head["kernel"] + head["bias"]).argmax(-1)
    assert readout.readouts(model, variables, images, np.asarray(expected))["2.1"] == 1
    with pytest.raises(ValueError, match="RegNet does not take"):
        params = {name: tree for name, tree in variables["params"].items() if name != "head"}
        readout.readouts(model.clone(num_classes=0), variables | {"params": params}, images, np.zeros(6))


def test_the_use_of_h_is_what_the_network_computes_without_it(monkeypatch):
    model, variables, images = made("regnet8_convrnn")
    logits = jax.jit(model.apply)(variables, images)
    labels = np.asarray(logits.argmax(-1))
    found = state_use.state_use(model, variables, images, labels)
    assert [stage.stage for stage in found] == [1, 2]

    # The same by the block itself: its fusion gets zeros.
    from regnet_flax.models.blocks import Block

    fuse = Block.fuse
    for number, stage in enumerate(found, start=1):
        monkeypatch.setattr(Block, "fuse", lambda self, x, h, n=4 * number: fuse(self, x, h * (self.features != n)))
        without = jax.jit(lambda *arguments: model.apply(*arguments))(variables, images)
        monkeypatch.undo()
        assert stage.logits_change == pytest.approx(
            float(jnp.linalg.norm(without - logits) / jnp.linalg.norm(logits)), rel=1e-4
        )
        assert stage.logits_change > 1e-3 and stage.accuracy[0] == 1
        assert stage.accuracy[1] == pytest.approx(1 - stage.predictions_change)
        kernel = variables["params"][f"stage{number}"]["block1"]["conv_fuse"]["kernel"]
        n = kernel.shape[-1]
        norms = float(jnp.linalg.norm(kernel[:, :, :n])), float(jnp.linalg.norm(kernel[:, :, n:]))
        assert list(stage.norms) == [f"{number}.{block}" for block in range(1, number + 1)]
        assert stage.norms[f"{number}.1"] == pytest.approx(norms, rel=1e-5)

    model, variables, images = made("resnet8")
    with pytest.raises(ValueError, match="no block of this RegNet fuses"):
        state_use.state_use(model, variables, images)


def test_the_ranges_of_gates_by_hand():
    gates = {"f": np.arange(101.0).reshape(1, 101, 1, 1) / 100, "g": np.full((2, 1, 1, 3), -0.5)}
    output = np.zeros((2, 1, 1, 3))
    blocks = [
        features.BlockFeatures(1, 1, output, {}, {}),
        features.BlockFeatures(1, 2, output, {"H": output}, gates, output),
    ]
    found = features.gate_ranges(blocks)
    assert list(found) == ["1.2"] and found["1.2"]["f"] == pytest.approx((0.01, 0.5, 0.99))
    assert found["1.2"]["g"] == (-0.5, -0.5, -0.5)


def test_grad_cam_of_any_block_in_any_family():
    # If the head reads a block's pooled output directly, the gradient is the head's kernel / the number of positions.
    model, variables, images = made("regnet8_convrnn")
    classes = np.arange(6)
    maps = grad_cam.grad_cam(model, variables, images, blocks=("1.1", "2.2"), classes=classes)
    assert maps["1.1"].shape == (6, 8, 8) and maps["1.1"].max() > 0
    found = maps["2.2"]
    (block,) = (block for block in features.inspect(model, variables, images) if block.name == "2.2")
    kernel = np.asarray(variables["params"]["head"]["kernel"])[:, classes].T[:, None, None, :]
    expected = np.maximum((kernel / 16 * block.output).sum(-1), 0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert found.shape == (6, 4, 4) and found.max() > 0
    with pytest.raises(ValueError, match=r"no block '3.1': name one of 1.1, 2.1, 2.2"):
        grad_cam.grad_cam(model, variables, images, blocks=["3.1"])


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["regnety_400mf", "rla_resnet50", "dia_resnet20", "wrn16_8"])
def test_grad_cam_of_other_families(name):
    model = create_model(name)
    model = model.clone(depth=2) if name.startswith("regnety") else model.clone(stage_sizes=(1, 1), width=4)
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    variables = jax.jit(lambda key: model.init(key, images, train=False))(jax.random.key(0))
    if name.startswith("rla"):
        with pytest.raises(ValueError, match="RLANet does not take"):
            readout.readouts(model, variables, images, np.zeros(2))
    maps = grad_cam.grad_cam(model, variables, images)
    assert maps
    for found in maps.values():
        assert found.shape[0] == 2 and found.max() > 0


@pytest.fixture
def figures(monkeypatch):
    """Collects the figures instead of closing them."""
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    return drawn


def test_the_pictures_show_what_was_measured(tmp_path, figures):
    probes.readouts({"a": {"3.1": 0.5, "3.2": 0.9}, "b": {"3.2": 0.8}}, tmp_path / "a.png", "title")
    (axes,) = figures[0].axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[50, 90], [80]]
    assert {text.get_text() for text in axes.texts} == {"50.0", "90.0", "80.0"}

    random = np.random.default_rng(0)
    draw = lambda: random.random((2, 4, 4, 3), np.float32)  # noqa: E731
    plain = [features.BlockFeatures(1, n, draw(), {}, {}) for n in (1, 2)]
    own = [features.BlockFeatures(1, n, draw(), {"H": draw()}, {"h": draw()}, draw()) for n in (1, 2)]
    probes.consecutive_blocks({"ResNet": plain, "RegNet": own}, draw()[0], tmp_path / "b.png", image=1)
    shown = [axes.images[0].get_array() for axes in figures[1].axes]
    expected = [a for block in own for a in (block.regulated, block.state["H"], block.output)]
    for array, block in zip(shown[1:], [*(b.output for b in plain), *expected], strict=True):
        np.testing.assert_array_equal(array, block[1].mean(-1))

    stages = [state_use.StageUse(s, {f"{s}.1": (2.0, 1.0)}, 0.1 * s, 0.02, None) for s in (1, 2)]
    probes.state_use(stages, tmp_path / "c.png")
    assert [bar.get_height() for bar in figures[2].axes[0].patches] == [2, 2, 1, 1]
    assert [bar.get_height() for bar in figures[2].axes[1].patches] == pytest.approx([10, 20])

    maps = {"1.2": random.random((2, 2, 2)), "2.1": np.zeros((2, 1, 1))}
    probes.grad_cam(random.random((2, 4, 4, 1)), maps, ["zero", "one"], tmp_path / "d.png")
    over = [axes.images[1].get_array() for axes in figures[3].axes if len(axes.images) > 1]
    np.testing.assert_array_equal(over[1], maps["1.2"][1])
    assert len(list(tmp_path.glob("*.png"))) == 4


@pytest.mark.thorough
def test_mode_analyze(tmp_path, capsys):
    small = ["--config.model.name=regnet8_convlstm", "--config.model.overrides.width=4", "--config.train.max_steps=4"]
    workdir = ["--workdir", str(tmp_path / "run")]
    run_program(*small, "--config.train.batch_size=128", *workdir)
    run_program("--mode=analyze", *workdir)
    found = json.loads((tmp_path / "run" / "analysis.json").read_text())
    assert found["images"] == 360 and list(found["readouts"]) == ["3.1"] and len(found["state_use"]) == 3
    assert list(found["gates"]) == ["1.1", "2.1", "3.1"]
    assert all(0 <= low <= middle <= high <= 1 for low, middle, high in (found["gates"]["1.1"][n] for n in "ifo"))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["readouts"]["3.1"] == pytest.approx(results["last"]["eval_accuracy"])
    pictures = {path.name for path in (tmp_path / "run" / "figures" / "analysis").iterdir()}
    assert pictures == {"readouts.png", "blocks.png", "state_use.png", "grad_cam.png"}
