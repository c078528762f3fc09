"""--mode predict, on image files outside the training set."""

import contextlib
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import helpers
from configs import rnn_photos
from regnet_flax import main
from regnet_flax import trained as trained_lib
from regnet_flax.data import photos
from regnet_flax.data.photos import read_image
from regnet_flax.data.sources import load_dataset
from regnet_flax.errors import ConfigError
from regnet_flax.models.ops import native_library
from regnet_flax.modes import predict
from regnet_flax.modes import train as loop

COLORS = {"brick": (170, 60, 40), "grass": (60, 160, 50), "sky": (110, 160, 230)}


def photograph(path, name, seed, size=(30, 20)):
    noise = np.random.default_rng(seed).normal(0, 25, (size[1], size[0], 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(np.array(COLORS[name]) + noise, 0, 255).astype(np.uint8)).save(path)


@pytest.fixture(autouse=True, scope="module")
def _shallow():
    with helpers.shallow("resnet8"):
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The workdir of a run on photographs whose classes differ in mean colour, and their folder."""
    root = tmp_path_factory.mktemp("predict")
    for split, numbers in (("train", range(8)), ("val", range(8, 11))):
        for name in COLORS:
            for i in numbers:
                photograph(root / "data" / split / name / f"{i}.png", name, seed=i)
    config = rnn_photos.get_config("resnet8")
    config.model.overrides.width = 4
    config.dataset.data_dir = str(root / "data")
    config.dataset.image_size = 8
    config.train.batch_size = 24
    config.train.epochs = 40
    config.optimizer.boundaries = (30,)
    config.eval.every_epochs = 20
    config.checkpoint.every_steps = 100
    results = loop.train_and_evaluate(config, root / "run", devices=jax.devices()[:1])
    assert results["last"]["eval_accuracy"] == 1
    return root / "run", root / "data"


@pytest.fixture
def unseen(tmp_path):
    """Photographs of other sizes, a damaged image file, and other files."""
    for seed, name in enumerate(COLORS):
        photograph(tmp_path / "new" / f"my {name} [1].jpg", name, seed=100 + seed, size=(41, 67))
    (tmp_path / "new" / "damaged.jpg").write_bytes(b"no image")
    (tmp_path / "new" / "notes.txt").write_text("no image file")
    (tmp_path / "new" / ".hidden.png").write_text("no image file")
    return tmp_path / "new"


def run(capfd, workdir, *arguments):
    code = main.main(["--mode", "predict", "--workdir", str(workdir), *arguments])
    out, err = capfd.readouterr()
    return code, out, err


def test_a_photograph_never_seen(trained, unseen, capfd, logger):
    workdir, _ = trained
    picture = workdir / "figures" / "predict.png"
    code, out, _ = run(capfd, workdir, f"--config.predict.images={unseen}")
    assert code == 0
    for name in COLORS:
        (line,) = [line for line in out.splitlines() if f"my {name} [1].jpg" in line]
        first, *others = line.split("│")[2:-1]
        assert first.split()[0] == name and len(others) == 2
        shares = [float(cell.split()[1].rstrip("%")) for cell in (first, *others)]
        assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(100, abs=0.2)
    assert f"left out {unseen / 'damaged.jpg'}: UnidentifiedImageError" in out
    assert "notes" not in out and ".hidden" not in out
    assert f"picture: {picture}" in out and np.asarray(Image.open(picture)).std() > 0


def test_json_is_all_that_standard_output_has(trained, unseen, capfd, logger, monkeypatch):
    workdir, _ = trained

    @contextlib.contextmanager
    def local_workdir(path, hold):
        logger.info("fetching 4 files")
        yield path
        logger.warning("sent")

    monkeypatch.setattr(main.places, "local_workdir", local_workdir)
    monkeypatch.setattr(native_library, "prepare", lambda: logger.info("native operations are off"))
    code, out, err = run(
        capfd,
        workdir,
        f"--config.predict.images={unseen}/*.jpg",
        "--config.predict.json=True",
        "--config.predict.top=2",
    )
    assert code == 0
    result = json.loads(out)
    assert result["model"] == "resnet8" and result["step"] > 0
    assert [p["file"] for p in result["predictions"]] == [str(unseen / f"my {name} [1].jpg") for name in COLORS]
    for name, prediction in zip(COLORS, result["predictions"], strict=True):
        first, second = prediction["top"]
        assert first["class"] == name and 1 >= first["probability"] > second["probability"] >= 0
    assert [entry["file"] for entry in result["skipped"]] == [str(unseen / "damaged.jpg")]
    for said in ("left out", "fetching 4 files", "warning: sent", "native operations are off"):
        assert said in err


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ("", "predict.images is ''"),
        ("{}/damaged.jpg", "none of the 1 files"),
        ("{}/nothing*.jpg", "matches no file"),
        ("{}/empty", "has no image files"),
    ],
)
def test_nothing_to_predict_is_one_line_and_exit_code_2(images, words, trained, unseen, capfd, logger):
    (unseen / "empty").mkdir()
    code, _, err = run(capfd, trained[0], f"--config.predict.images={images.format(unseen)}")
    assert code == 2
    (line,) = err.strip().splitlines()
    assert line.startswith("error: ") and words in line


def test_a_workdir_without_a_run(tmp_path, unseen, capfd, logger):
    code, _, err = run(capfd, tmp_path / "none", f"--config.predict.images={unseen}")
    assert code == 2 and "there is no checkpoint" in err


def test_which_files_are_meant(unseen, tmp_path):
    names = [f"my {name} [1].jpg" for name in COLORS]
    one = str(unseen / names[0])
    assert predict.find_images(one) == [unseen / names[0]]  # although [1] is a pattern
    assert [path.name for path in predict.find_images(str(unseen))] == ["damaged.jpg", *names]
    assert [path.name for path in predict.find_images(f"{unseen}/my*")] == names
    assert [path.name for path in predict.find_images(f"{tmp_path}/**/my*")] == names
    assert len(predict.find_images(str(tmp_path))) == 4
    assert predict.find_images(f"{unseen}/notes.txt") == [unseen / "notes.txt"]
    with pytest.raises(ConfigError, match="matches no file"):
        predict.find_images(str(unseen / "nowhere.jpg"))


def test_images_are_resized_as_for_evaluation(trained):
    _, data = trained
    test = load_dataset("folder", data_dir=str(data), image_size=8).test
    files = sorted(data.glob("val/*/*.png"))
    assert len(files) == len(test.images) == 9
    for file, image in zip(files, test.images, strict=True):
        np.testing.assert_array_equal(trained_lib.to_input(read_image(file), (8, 8, 3)), image)
    grey = trained_lib.to_input(read_image(files[0]), (5, 7, 1))
    assert grey.shape == (5, 7, 1) and grey.dtype == np.uint8
    assert abs(grey.mean() - (0.299 * 170 + 0.587 * 60 + 0.114 * 40)) < 5


def test_the_centre_is_cropped_as_for_evaluation(trained):
    _, data = trained
    file = sorted(data.glob("val/*/*.png"))[0]
    expected = photos.read_crop(file, 6, functools.partial(photos.centre_box, size=6))
    found = trained_lib.to_input(read_image(file), (6, 6, 3), crop=True)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_probabilities_are_the_softmax_of_normalised_images_whatever_the_batch(batch_size):
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 1), dtype=np.uint8)

    class Linear(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(3)(x.reshape(len(x), -1))

    kernel = np.random.default_rng(1).normal(size=(16, 3)).astype("f")
    variables = {"params": {"Dense_0": {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(3)}}}
    found = trained_lib.probabilities(Linear(), variables, images, (0.5,), (0.25,), batch_size)
    logits = ((images.reshape(7, 16) / 255 - 0.5) / 0.25) @ kernel.astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert found.shape == (7, 3)
    np.testing.assert_allclose(found, expected, atol=1e-5)
