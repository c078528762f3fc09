"""The weights that come with the package: their cards, and their accuracy."""

import functools
import io
import json
import os
import pathlib
import re
import tarfile

import numpy as np
import pytest
from PIL import Image

import regnet_flax
from helpers import bomb, run_process, run_program
from regnet_flax import main
from regnet_flax.modes import model_card
from regnet_flax.port import shipped

ROOT = pathlib.Path(main.__file__).resolve().parent.parent
NAMES = ("regnet20_convlstm.cifar10", "resnet20.cifar10")
PICTURES = sorted((ROOT / "tests" / "stored" / "cifar10").glob("*.png"))  # the first of each class's test images
# CIFAR-10's images as test/CLASS/NUMBER.jpg, or the original ones as NUMBER.png. The cards have an accuracy for each.
ARCHIVE = pathlib.Path(os.environ.get("CIFAR10_IMAGES", ROOT.parent / "shared" / "data" / "cifar10-images.tar.xz"))

ACCURACIES = r"\| accuracy \| (?P<png>\S+)% \| (?P<jpg>\S+)% \|"


@functools.cache
def card(name):
    return model_card.find(shipped.find(name)).read_text()


def test_they_are_all_tested_and_have_cards():
    assert tuple(regnet_flax.list_weights()) == NAMES
    for name in NAMES:
        assert f"model: {name.split('.')[0]}\n" in card(name) and "JPEG" in card(name)


@pytest.mark.parametrize("name", NAMES)
def test_ten_pictures(name):
    trained = regnet_flax.load(name)
    assert list(trained.class_names) == [path.stem for path in PICTURES]
    images = np.stack([np.asarray(Image.open(path)) for path in PICTURES])
    probabilities = trained.predict(images)
    assert (probabilities.argmax(-1) == np.arange(10)).sum() >= 8
    np.testing.assert_allclose(probabilities, np.concatenate([trained.predict(path) for path in PICTURES]), atol=1e-5)


def test_the_command_line_predicts_with_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_program(
        "--mode=predict", "--config.model.init_from=resnet20.cifar10", "--config.predict.json=True",
        f"--config.predict.images={PICTURES[0].parent}", check=0,
    )  # fmt: skip
    found = {pathlib.Path(p["file"]).stem: p["top"][0]["class"] for p in json.loads(done.stdout)["predictions"]}
    assert len(found) == 10 and sum(name == best for name, best in found.items()) >= 8


def test_a_photo_of_a_hundred_million_pixels_is_refused_without_a_warning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bomb(tmp_path / "huge.png", 10_000)
    done = run_process(
        "--mode=predict", "--config.model.init_from=resnet20.cifar10", "--config.predict.images=huge.png", check=2
    )  # fmt: skip
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: none of the 1 files"), done.stderr


@pytest.mark.thorough
@pytest.mark.skipif(not ARCHIVE.exists(), reason="CIFAR10_IMAGES does not name an archive of CIFAR-10's images")
@pytest.mark.parametrize("name", NAMES)
def test_the_accuracy_of_the_card(name):
    images, labels = [], []
    trained = regnet_flax.load(name)
    with tarfile.open(ARCHIVE) as archive:
        for member in archive:
            if found := re.fullmatch(r"(?:\./)?test/(\w+)/\w+\.(jpg|png)", member.name):
                images.append(np.asarray(Image.open(io.BytesIO(archive.extractfile(member).read())).convert("RGB")))
                labels.append(trained.class_names.index(found[1]))
                form = found[2]
    assert len(images) == 10_000
    probabilities = np.concatenate([trained.predict(np.stack(images[i : i + 500])) for i in range(0, 10_000, 500)])
    right = (probabilities.argmax(-1) == labels).sum()
    # Another processor's rounding may change a picture or two.
    assert abs(right / 10_000 - float(re.search(ACCURACIES, card(name))[form]) / 100) <= 3e-4
