"""Exported programs and model cards, used without the package and flax."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
import regnet_flax
from helpers import random_variables
from regnet_flax import create_model, load, main
from regnet_flax.data.augment import normalize
from regnet_flax.modes import export, model_card
from regnet_flax.places.bucket import Bucket, filesystem

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
TINY = [
    "--config.model.name=regnet8_convlstm",
    "--config.model.overrides.width=4",
    "--config.train.batch_size=128",
    "--config.train.max_steps=4",
    "--config.checkpoint.every_steps=2",
]


@pytest.mark.parametrize(
    "name, options",
    [
        ("regnet20_convlstm", {}),
        ("se_regnet50_convgru", {"kernel": "dense"}),
        ("regnet_proj_cifar", {}),
        pytest.param("resnet_rnn20_convgru", {}, marks=pytest.mark.thorough),
        ("resnet20", {"dtype": jnp.bfloat16, "shortcut": "A"}),
        ("regnety_400mf", {}),
    ],
)
def test_a_program_computes_what_the_model_does(name, options):
    model = create_model(name, num_classes=5, **options)
    sizes = (3, 1) if name == "regnet20_convlstm" else (2, 1)  # one of them scans two blocks
    model = model.clone(depth=3) if name.startswith("regnety") else model.clone(stage_sizes=sizes, width=4)
    images = np.random.default_rng(1).integers(0, 256, (7, 12, 10, 3), np.uint8)
    variables = random_variables(model, jnp.zeros(images.shape))
    program = jax.export.deserialize(bytearray(export.stablehlo(model, variables, (12, 10, 3), MEAN, STD)))
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert "stablehlo.while" not in program.mlir_module()
    assert "regnet_flax_" not in program.mlir_module()  # native operations, which another process lacks
    expected = jax.jit(lambda x: model.apply(variables, normalize(x, MEAN, STD), train=False))(images)
    tolerance = 0.03 if model.dtype == jnp.bfloat16 else 1e-4
    scale = np.abs(expected).max()
    for count in (7, 1):
        found = np.asarray(program.call(images[:count]))
        assert found.dtype == np.float32 and found.shape == (count, 5)
        np.testing.assert_allclose(found / scale, expected[:count] / scale, atol=tolerance)
    with pytest.raises(ValueError, match="shape"):
        program.call(images[:, :10])


@pytest.fixture(autouse=True, scope="module")
def _shallow():
    with helpers.shallow("regnet8_convlstm"):
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
        assert main.main([*TINY, "--workdir", str(workdir)]) == 0
    return workdir


# Only jax, its dependencies and flatbuffers can be imported.
STRANGER = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("regnet_flax", "configs", "flax", "optax", "orbax", "ml_collections", "torch"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import numpy as np
given = np.load("given.npy")
"""


def code_of(card, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", card, re.S)


def test_a_stranger_runs_the_program_as_its_card_says(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
    file = tmp_path / "deep" / "digits.stablehlo"
    command = ["--mode=export", "--workdir", str(trained), "--config.export.format=stablehlo"]
    assert main.main([*command, f"--config.export.path={file}", "--config.eval.checkpoint=last"]) == 0
    assert sorted(p.name for p in file.parent.iterdir()) == ["README.md", "digits.stablehlo", "digits.stablehlo.json"]

    given = np.random.default_rng(2).integers(0, 256, (9, 8, 8, 1), np.uint8)
    np.save(file.parent / "given.npy", given)
    (code,) = code_of((file.parent / "README.md").read_text())
    code, count = re.subn(r"images = .*", "images = given", code)
    assert count == 1
    subprocess.run(
        [sys.executable, "-c", STRANGER + code + "np.save('logits.npy', logits)"],
        cwd=file.parent,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        check=True,
        timeout=300,
    )

    config, _ = main.parse(["--mode=eval", "--workdir", str(trained), "--config.eval.checkpoint=last"])
    from regnet_flax.modes.setup.models import load_trained

    model, variables, step = load_trained(config, trained)
    images = normalize(given, config.dataset.mean, config.dataset.std)
    expected = jax.jit(lambda x: model.apply(variables, x, train=False))(images)
    logits = np.load(file.parent / "logits.npy")
    assert np.std(logits) > 0.1
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)

    beside = json.loads((file.parent / "digits.stablehlo.json").read_text())
    assert beside["step"] == str(step) and beside["class_names"] == [str(i) for i in range(10)]
    assert beside["image_shape"] == [8, 8, 1]


def test_the_card_tells_the_run_and_loads_the_weights(trained, tmp_path, monkeypatch):
    export_it = ["--mode=export", "--workdir", str(trained), "--config.eval.checkpoint=last"]
    for kind in ("safetensors", "torch", "stablehlo"):
        assert main.main([*export_it, f"--config.export.format={kind}"]) == 0
    card = (trained / "README.md").read_text()
    results = json.loads((trained / "results.json").read_text())
    config = json.loads((trained / "config.json").read_text())
    assert card.startswith("---\nlibrary_name: regnet_flax\n")
    assert f"accuracy | {results['last']['eval_accuracy']:.2%} |" in card
    assert f"{results['parameters']:,} parameters" in card and "options" not in card and "width=4" in card
    for fact in ("regnet8_convlstm", "step 4", "batches of 128", "cosine", "0, 1, 2, 3, 4, 5, 6, 7, 8, 9", "8×8"):
        assert fact in card, fact
    assert str(tuple(round(m, 6) for m in config["dataset"]["mean"])) in card
    assert "- model.stablehlo\n- weights.pth\n- weights.safetensors\n---" in card
    assert str(trained) not in card and "optimistic" not in card  # this is `last`

    program, weights = code_of(card)
    monkeypatch.chdir(trained)
    given = np.random.default_rng(3).integers(0, 256, (4, 8, 8, 1), np.uint8)
    found = []
    for code in (program, weights):
        code, count = re.subn(r"images = .*", "images = given", code)
        assert count == 1
        names = {"given": given}
        exec(code, names)
        found.append(np.asarray(names["probabilities"]))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-5)

    # Files of another checkpoint are not listed with these.
    assert main.main(["--mode=export", "--workdir", str(trained), "--config.eval.checkpoint=2"]) == 0
    card = (trained / "README.md").read_text()
    assert "files:\n- weights.safetensors\n---" in card and "step: 2\n" in card


def test_a_readme_of_ones_own_stays(trained, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    path = tmp_path / "w.safetensors"
    assert main.main(["--mode=export", "--workdir", str(trained), f"--config.export.path={path}"]) == 0
    assert (tmp_path / "README.md").read_text() == "mine"
    assert "# regnet8_convlstm" in (tmp_path / "w.safetensors.md").read_text()


def test_a_card_without_a_loss_that_was_not_finite_and_of_one_file_alone(trained):
    found = load(trained)
    line = {"step": 4, "eval_accuracy": 0.5}
    table = model_card._metrics([line], None, found.config, "step 4")
    assert table == "| all test images | |\n| --- | --- |\n| accuracy | 50.00% |"

    several = model_card.describe(found, trained, ["a.stablehlo", "as.safetensors", "s.safetensors"])
    alone = model_card.of_one_file(several, "s.safetensors", "weights.safetensors")
    assert alone == model_card.describe(found, trained, ["weights.safetensors"])


def test_each_file_of_a_directory_keeps_its_card(trained, tmp_path):
    export_it = ["--mode=export", "--workdir", str(trained)]
    for name, step in (("a", 2), ("b", "last"), ("a", "last"), ("b", 2)):
        path = tmp_path / f"{name}.safetensors"
        assert main.main([*export_it, f"--config.export.path={path}", f"--config.eval.checkpoint={step}"]) == 0
    cards = {name: model_card.find(tmp_path / f"{name}.safetensors") for name in "ab"}
    assert {name: card.name for name, card in cards.items()} == {"a": "README.md", "b": "b.safetensors.md"}
    assert "step: 4\n" in cards["a"].read_text() and "step: 2\n" in cards["b"].read_text()


def test_the_cards_in_a_bucket_stay(trained, tmp_path, monkeypatch):
    """A README.md of one's own, and another file's card; a class has a name that is no UTF-8."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    filesystem.cache_clear()
    one = regnet_flax.load(trained)
    one = dataclasses.replace(one, class_names=("caf\udce9", *one.class_names[1:]))
    for place in ("own", "shared"):
        bucket = Bucket(f"memory://exports/{place}")
        bucket.write({"README.md": b"mine", "data/0.png": b"0"} if place == "own" else {})
        for name, step in (("a", 2), ("b", 4), ("c", 2)):
            one.config.export.path = f"{bucket.url}/{name}.safetensors"
            export.export_model(dataclasses.replace(one, step=step), trained)
        cards = {name: bucket.read(name) for name in bucket.list() if name.endswith(".md")}
        assert bucket.read("a.safetensors") and (place == "shared" or bucket.read("data/0.png") == b"0")
        assert b"step: 4\n" in cards["b.safetensors.md"]
        if place == "own":
            assert cards["README.md"] == b"mine" and len(cards) == 4
        else:
            assert b"step: 2\nfiles:\n- a.safetensors\n- c.safetensors\n-" in cards["README.md"] and len(cards) == 2
    assert r"caf\udce9, 1, 2" in cards["README.md"].decode()


def test_a_program_in_a_file_of_weights_is_refused(trained, tmp_path, capsys):
    path = tmp_path / "w.safetensors"
    command = ["--mode=export", "--workdir", str(trained), f"--config.export.path={path}"]
    assert main.main([*command, "--config.export.format=stablehlo"]) == 2
    assert "must end in .stablehlo" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert main.main([*command, "--config.export.format=torch"]) == 2
    assert "ends in .safetensors: name a .pth file" in capsys.readouterr().err and not list(tmp_path.iterdir())
    command[-1] = f"--config.export.path={tmp_path / 'w.h5'}"
    assert main.main(command) == 2
    assert capsys.readouterr().err.rstrip().endswith(".bin") and not list(tmp_path.iterdir())
    path.mkdir()
    command[-1] = f"--config.export.path={path}"
    assert main.main(command) == 2
    assert f"{path} cannot be written (Is a directory): name another place" in capsys.readouterr().err
