"""Data sets in memory: what is read, and the one-line error if it cannot be."""

import dataclasses
import importlib.util
import json
import logging
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
import warnings
from importlib.machinery import PathFinder
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from regnet_flax import main
from regnet_flax.data import folder as image_folder
from regnet_flax.data import sources
from regnet_flax.data import tfds as tfds_prepared
from regnet_flax.data.folder import Split
from regnet_flax.data.sources import Dataset, channel_statistics, hold_out, load_dataset
from regnet_flax.errors import DataError
from regnet_flax.modes.setup import datasets

ROOT = Path(__file__).parents[1]
RED, GREEN, BLUE = (250, 0, 0), (0, 250, 0), (0, 0, 250)


def error_of(name, **options):
    """Returns the message of load_dataset's DataError, and checks that it is one line."""
    with pytest.raises(DataError) as caught:
        load_dataset(name, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 900
    return message


def draw(path, colour=RED, size=(12, 8), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    """A folder with two classes, two train images and one test image each."""
    for name, colour in (("cat", RED), ("ant", GREEN)):
        for path in ("train/{}/b.png", "train/{}/a.png", "test/{}/c.png"):
            draw(tmp_path / path.format(name), colour)
    return tmp_path


# Any data set


def test_unknown_name_gives_the_closest():
    assert "did you mean cifar10 or cifar100?" in error_of("cifar_10")
    assert "one of digits, cifar10, cifar100, folder, synthetic" in error_of("q")


def test_other_class_count_is_an_error():
    message = error_of("digits", num_classes=7)
    assert "num_classes=7" in message and "10 classes" in message
    assert len(load_dataset("digits", num_classes=10).class_names) == 10


def test_fingerprint_sees_every_part():
    def dataset(name="a", pixel=0, label=0, test_pixel=0, test_label=0, classes=("x", "y"), shape=(2, 2, 3, 1)):
        def split(pixel, label):
            return Split(np.full(shape, pixel, np.uint8), np.array([0, label], np.int32))

        return Dataset(name, split(pixel, label), split(test_pixel, test_label), classes)

    whole = dataset()
    others = [dataclasses.replace(whole, validation=split) for split in (whole.train, dataset(pixel=1).train)]
    changes = (
        {"name": "b"},
        {"pixel": 1},
        {"label": 1},
        {"test_pixel": 1},
        {"test_label": 1},
        {"classes": ("x", "z")},
        {"shape": (2, 3, 2, 1)},
    )
    prints = [other.fingerprint() for other in (whole, *others, *(dataset(**change) for change in changes))]
    assert len(set(prints)) == len(prints)
    assert dataset().fingerprint() == prints[0]


def test_channel_statistics_are_exact_and_small():
    images = np.random.default_rng(0).integers(0, 256, (60, 256, 256, 3), np.uint8)
    images[..., 1] //= 3
    tracemalloc.start()
    means, stds = channel_statistics(images)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(means, images.sum((0, 1, 2)) / (60 * 256 * 256 * 255), rtol=1e-12)
    np.testing.assert_allclose(stds, (images / 255).std((0, 1, 2)), rtol=1e-9)
    assert peak < images.nbytes / 2
    assert channel_statistics(np.full((3, 2, 2, 1), 51, np.uint8)) == ((0.2,), (0.0,))


def test_resized_like_pillow():
    small, large = load_dataset("digits"), load_dataset("digits", image_size=20)
    assert large.train.images.shape == (1437, 20, 20, 1) and large.test.images.shape == (360, 20, 20, 1)
    expected = Image.fromarray(small.test.images[5, ..., 0]).resize((20, 20), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(large.test.images[5, ..., 0], np.asarray(expected))
    np.testing.assert_array_equal(large.test.labels, small.test.labels)


def test_resizing_beyond_the_memory_is_refused(monkeypatch):
    monkeypatch.setattr(image_folder, "_free_memory", lambda: 10**6)
    message = error_of("digits", image_size=224)
    assert "1,797 images of 224x224x1" in message and "image_size" in message


# Held out for validation


def test_held_out_images_are_drawn_by_seed():
    # A run that resumes under another version of NumPy or of this package must train on the same images.
    kept, held = hold_out("x", 10, 3, 0, None)
    assert kept.tolist() == [1, 2, 4, 5, 6, 8, 9] and held.tolist() == [0, 3, 7]
    assert hold_out("x", 10, 0.3, 0, None)[1].tolist() == [0, 3, 7]
    assert hold_out("x", 10, 3, 1, None)[1].tolist() == [4, 7, 8]

    whole = load_dataset("digits")
    kept, held = hold_out("digits", 1437, 0.1, 5, whole.train.labels)
    assert len(held) == 144 and sorted([*kept, *held]) == list(range(1437))
    dataset = load_dataset("digits", validation=0.1, seed=5)
    assert (dataset.size("train"), dataset.size("validation"), dataset.size("test")) == (1293, 144, 360)
    for split, indices in ((dataset.train, kept), (dataset.validation, held)):
        np.testing.assert_array_equal(split.images, whole.train.images[indices])
        np.testing.assert_array_equal(split.labels, whole.train.labels[indices])
    np.testing.assert_array_equal(dataset.images("validation", np.array([2])), whole.train.images[held[2:3]])
    np.testing.assert_array_equal(dataset.test.images, whole.test.images)
    assert (whole.evaluated, dataset.evaluated) == ("test", "validation")
    assert dataset.statistics() == channel_statistics(whole.train.images[kept])
    large = load_dataset("digits", validation=0.1, seed=5, image_size=9)
    assert large.train.images.shape == (1293, 9, 9, 1) and large.validation.images.shape == (144, 9, 9, 1)

    others = [load_dataset("digits", **options) for options in ({"validation": 144}, {"validation": 145, "seed": 5})]
    assert len({other.fingerprint() for other in (whole, dataset, *others)}) == 4
    assert load_dataset("digits", validation=144, seed=5).fingerprint() == dataset.fingerprint()


@pytest.mark.fault("more images to hold out than there are")
def test_too_many_images_held_out(folder):
    for validation in (1437, 10**9, 1e-5):
        message = error_of("digits", validation=validation)
        assert f"dataset.validation is {validation}: " in message and "a number from 1 to 1436" in message
    message = error_of("folder", data_dir=str(folder), validation=3)
    assert "dataset.validation is 3: " in message and "all images of 1 of the classes" in message


def test_the_splits_are_said(folder, logger, caplog):
    caplog.set_level(logging.INFO, "regnet_flax")
    for value, words in (
        ("0", "digits: 1437 training and 360 test images of 10"),
        ("100", "digits: 1337 training, 100 validation and 360 test images of 10"),
        ("0.1", "digits: 1293 training, 144 validation and 360 test images of 10"),
    ):
        config, _ = main.parse([f"--config.dataset.validation={value}", "--config.seed=5"])
        assert json.loads(config.to_json())["dataset"]["validation"] == float(value)
        expected = load_dataset("digits", validation=float(value), seed=5)
        assert datasets.open_dataset(config).fingerprint() == expected.fingerprint()
        assert words in caplog.text
    arguments = [
        "--config=configs/rnn_photos.py",
        f"--config.dataset.data_dir={folder}",
        "--config.dataset.image_size=8",
    ]
    config, _ = main.parse([*arguments, "--config.dataset.augment=()"])
    datasets.open_dataset(config)
    assert f"{folder}: train on train/, test on test/\n" in caplog.text
    draw(folder / "Val/ant/d.png")
    config.dataset.in_memory = "never"
    datasets.open_dataset(config)
    assert f"{folder}: train on train/, test on test/, validation on Val/\n" in caplog.text
    assert "folder: 4 training, 1 validation and 2 test images of 2" in caplog.text


# Digits and synthetic images


def test_digits():
    dataset = load_dataset("digits")
    assert dataset.train.images.shape == (1437, 8, 8, 1) and dataset.test.images.shape == (360, 8, 8, 1)
    assert dataset.train.images.dtype == np.uint8 and dataset.train.labels.dtype == np.int32
    assert set(np.unique(dataset.train.images)) == set(np.rint(np.arange(17) * 255 / 16).astype(int))
    assert dataset.class_names == tuple("0123456789")
    assert sources.IMAGES["digits"] == (dataset.train.images.shape[1:], 10)
    assert set(dataset.train.labels) == set(dataset.test.labels) == set(range(10))
    # Results are comparable only with this split.
    assert dataset.fingerprint() == "4d449e4d0327a29c"


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    message = error_of("digits")
    assert "pip install scikit-learn" in message and "--config configs/folder.py" in message


def test_synthetic():
    dataset = load_dataset("synthetic")
    assert dataset.train.images.shape == (1024, 32, 32, 3) and dataset.test.images.shape == (256, 32, 32, 3)
    assert len(dataset.class_names) == 10
    assert load_dataset("synthetic").fingerprint() == dataset.fingerprint()
    assert load_dataset("synthetic", seed=1).fingerprint() != dataset.fingerprint()
    assert not np.array_equal(dataset.train.images[:256], dataset.test.images)

    other = load_dataset("synthetic", image_size=8, num_classes=200)
    assert other.train.images.shape == (1024, 8, 8, 3) and len(other.class_names) == 200
    assert set(other.train.labels) == set(other.test.labels) == set(range(200))


# Image folders


def test_folder_is_sorted_and_complete(folder):
    draw(folder / "train/cat/c.JPEG", BLUE, size=(40, 90))
    draw(folder / "train/cat/.hidden.png", BLUE)
    draw(folder / "train/.cache/a.png", BLUE)
    (folder / "train/cat/notes.txt").write_text("no image")
    (folder / "train/README.md").write_text("no class")
    dataset = load_dataset("folder", data_dir=str(folder), image_size=6)
    assert dataset.class_names == ("ant", "cat") and dataset.skipped == ()
    assert dataset.train.images.shape == (5, 6, 6, 3) and dataset.test.images.shape == (2, 6, 6, 3)
    assert dataset.train.images.dtype == np.uint8 and dataset.train.labels.dtype == np.int32
    assert dataset.train.labels.tolist() == [0, 0, 1, 1, 1] and dataset.test.labels.tolist() == [0, 1]
    np.testing.assert_allclose(dataset.train.images[:, 3, 3], [GREEN, GREEN, RED, RED, BLUE], atol=3)


@pytest.mark.parametrize("names", [("Train", "Test"), ("train", "val"), ("train", "Val")])
def test_folder_names_of_the_splits(folder, names):
    (folder / "train").rename(folder / "renamed")
    (folder / "renamed").rename(folder / names[0])
    (folder / "test").rename(folder / names[1])
    dataset = load_dataset("folder", data_dir=str(folder))
    assert len(dataset.train.labels) == 4 and len(dataset.test.labels) == 2


def test_folder_with_val_beside_test_has_a_validation_split(folder):
    # The same in every version, so that a run on such a folder can resume.
    before = load_dataset("folder", data_dir=str(folder))
    assert before.validation is None and before.fingerprint() == "5ec4b6d46428b189"
    draw(folder / "val/cat/d.png", BLUE)
    dataset = load_dataset("folder", data_dir=str(folder))
    assert dataset.evaluated == "validation" and dataset.validation.labels.tolist() == [1]
    np.testing.assert_array_equal(dataset.validation.images, np.broadcast_to(BLUE, (1, 8, 12, 3)))
    assert (dataset.size("train"), dataset.size("test")) == (4, 2)
    assert dataset.fingerprint() != before.fingerprint()
    message = error_of("folder", data_dir=str(folder), validation=1)
    assert (
        "dataset.validation is 1, but" in message and "val/ beside test/: set --config.dataset.validation=0" in message
    )


def test_folder_of_one_size_needs_no_image_size(folder):
    dataset = load_dataset("folder", data_dir=str(folder))
    assert dataset.train.images.shape == (4, 8, 12, 3)
    draw(folder / "test/cat/d.png", size=(8, 12))
    message = error_of("folder", data_dir=str(folder))
    assert "d.png is 8x12" in message and "12x8" in message and "--config.dataset.image_size" in message


def test_folder_is_resized_with_antialias(folder):
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    Image.fromarray(noise).save(folder / "train/ant/a.png")
    dataset = load_dataset("folder", data_dir=str(folder), image_size=7)
    expected = Image.fromarray(noise).resize((7, 7), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(dataset.train.images[0], np.asarray(expected))


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("x.png", "L"),
        ("x.png", "LA"),
        ("x.png", "P"),
        ("x.png", "RGBA"),
        ("x.jpg", "CMYK"),
        ("x.tiff", "YCbCr"),
        ("x.bmp", "RGB"),
        ("x.webp", "RGB"),
        ("x.ppm", "RGB"),
        ("X.GIF", "P"),
    ],
)
def test_every_mode_becomes_rgb(folder, name, mode):
    draw(folder / "train/ant" / name, mode=mode)
    shutil.move(folder / "train/ant" / name, folder / "train/ant" / f"0{name}")
    image = load_dataset("folder", data_dir=str(folder)).train.images[0]
    grey = round(0.299 * RED[0])
    np.testing.assert_allclose(image[4, 4], (grey,) * 3 if mode.startswith("L") else RED, atol=6)


@pytest.mark.filterwarnings("error")
def test_palette_with_transparency(folder):
    draw(folder / "train/ant/0.png", mode="P", transparency=bytes(range(256)))  # nearly all transparent, on white
    image = load_dataset("folder", data_dir=str(folder)).train.images[0]
    np.testing.assert_allclose(image[4, 4], (255, 240, 240), atol=6)


@pytest.mark.parametrize("name", ["0.png", "0.tif", "0.ppm"])
def test_sixteen_bits_are_scaled(folder, name):
    values = np.linspace(0, 65535, 96).reshape(8, 12).astype(np.uint16)
    Image.fromarray(values).save(folder / "train/ant" / name)
    image = load_dataset("folder", data_dir=str(folder)).train.images[0]
    np.testing.assert_array_equal(image, np.repeat((values // 256)[..., None], 3, -1))


def test_exif_rotation_is_honoured(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # It must be turned clockwise by 90 degrees.
    pixels = np.zeros((12, 8, 3), np.uint8)
    pixels[:, :2] = RED
    Image.fromarray(pixels).save(folder / "train/ant/0.png", exif=exif)
    image = load_dataset("folder", data_dir=str(folder)).train.images[0]
    np.testing.assert_array_equal(image[:2], np.broadcast_to(RED, (2, 12, 3)))
    assert not image[2:].any()


def test_first_frame_of_a_gif(folder):
    frames = [Image.new("RGB", (12, 8), colour) for colour in (BLUE, RED)]
    frames[0].save(folder / "train/ant/0.gif", save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(load_dataset("folder", data_dir=str(folder)).train.images[0, 4, 4], BLUE, atol=3)


def spoil(folder, how):
    path = folder / "train/ant/b.png"
    if how == "text":
        path.write_text("this is no image")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:5000])
    elif how == "dangling":
        path.unlink()
        path.symlink_to(folder / "nowhere.png")
    elif how == "float":
        path = path.with_suffix(".tif")
        Image.fromarray(np.ones((8, 12), np.float32)).save(path)
    return path


@pytest.mark.parametrize("how", ["text", "empty", "truncated", "dangling", "float"])
@pytest.mark.fault("an image that does not decode")
def test_an_image_that_does_not_decode(folder, how):
    path = spoil(folder, how)
    kept = 4 if how == "float" else 3
    for image_size in (0, 5):
        dataset = load_dataset("folder", data_dir=str(folder), image_size=image_size)
        assert len(dataset.skipped) == 1 and dataset.skipped[0].startswith(f"{path}: ")
        assert "\n" not in dataset.skipped[0]
        assert dataset.train.labels.tolist() == [0] * (kept - 2) + [1, 1] and len(dataset.test.labels) == 2
        np.testing.assert_array_equal(dataset.train.images[:, 2, 2], [GREEN] * (kept - 2) + [RED] * 2)
        message = error_of("folder", data_dir=str(folder), image_size=image_size, strict=True)
        assert str(path) in message and "--config.dataset.strict=False" in message


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # a warning, as in a user's process
@pytest.mark.parametrize("pixels", [8 * 12 + 30, 8 * 12 * 2 + 30])  # Pillow warns about the first, rejects the second
def test_decompression_bombs_do_not_decode_and_warnings_stay_warnings(folder, monkeypatch, pixels):
    draw(folder / "train/ant/z.png", size=(pixels, 1))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8 * 12)
    before, during, pillows = list(warnings.filters), [], Image.open

    def record(file, **options):
        during.append(list(warnings.filters))
        return pillows(file, **options)

    monkeypatch.setattr(Image, "open", record)
    dataset = load_dataset("folder", data_dir=str(folder), image_size=5)
    assert len(dataset.skipped) == 1 and "z.png: DecompressionBombError" in dataset.skipped[0]
    assert during and all(filters == before for filters in during), "the filters are the whole process's"


@pytest.mark.fault("a class in which no image decodes")
def test_a_class_of_which_no_image_decodes(folder):
    for name in "ab":
        (folder / f"train/ant/{name}.png").write_text("no image")
    message = error_of("folder", data_dir=str(folder), image_size=5)
    assert f"{folder / 'train/ant'}: none of its 2 image files decodes" in message
    for path in folder.glob("*/*/*.png"):
        path.write_text("no image")
    assert "none of the 6 image files decodes" in error_of("folder", data_dir=str(folder))


def remove(*paths):
    return lambda root: [shutil.rmtree(root / path) for path in paths]


def empty(*paths):
    return lambda root: [image.unlink() for path in paths for image in (root / path).rglob("*.png")]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (remove("train"), "{root} has no directory train or Train"),
        (remove("test"), "{root} has no directory test or Test or val or Val or valid"),
        (remove("train/ant", "train/cat"), "{root}/train has no class folders"),
        (remove("test/ant", "test/cat"), "{root}/test has no class folders"),
        (remove("train/ant", "test/ant"), "only one class (cat)"),
        (empty("train/ant"), "{root}/train/ant has no images"),
        (empty("test/cat"), "{root}/test/cat has no images"),
        (lambda root: shutil.rmtree(root), "{root} is not a directory"),
    ],
)
@pytest.mark.fault("a folder with another layout")
def test_folder_laid_out_otherwise(folder, change, expected):
    change(folder)
    assert expected.format(root=folder) in error_of("folder", data_dir=str(folder), image_size=5)


def test_folder_one_level_too_high(folder, tmp_path):
    inner = tmp_path.parent / f"{tmp_path.name}_outer" / "photos"
    inner.parent.mkdir()
    folder.rename(inner)
    assert f"did you mean --config.dataset.data_dir={inner}?" in error_of("folder", data_dir=str(inner.parent))


def test_test_split_may_lack_a_class(folder):
    shutil.rmtree(folder / "test/ant")
    assert load_dataset("folder", data_dir=str(folder)).test.labels.tolist() == [1]


def test_folder_without_a_directory_or_permission(folder, monkeypatch):
    assert "--config.dataset.data_dir=DIR" in error_of("folder")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(image_folder.os, "scandir", refuse)
    assert "cannot be listed (PermissionError" in error_of("folder", data_dir=str(folder))


@pytest.mark.fault("more images than fit in memory")
def test_folder_beyond_the_memory_is_refused_before_decoding(folder, monkeypatch):
    monkeypatch.setattr(image_folder, "_free_memory", lambda: 2 * 6 * 50 * 50 * 3 - 1)
    monkeypatch.setattr(image_folder, "read_image", lambda path: pytest.fail("decoded"))
    message = error_of("folder", data_dir=str(folder), image_size=50)
    assert "6 images of 50x50x3" in message and "image_size" in message


def test_images_of_their_own_size_beyond_the_memory(folder, monkeypatch):
    monkeypatch.setattr(image_folder, "_free_memory", lambda: 1000)
    assert "6 images of 8x12x3" in error_of("folder", data_dir=str(folder))


def test_free_memory_is_known_on_linux():
    if sys.platform == "linux":
        assert 2**20 < image_folder._free_memory() < 2**50


# TFDS

WRITE = """
import sys
import numpy as np
from tensorflow_datasets.image_classification import cifar
from regnet_flax.data import sources
from regnet_flax.data import tfds as tfds_prepared

def generate(keys, count):
    for i in range(count):
        image = np.full((32, 32, 3), i, np.uint8)
        image[0, 0] = 255, 0, 128
        labels = dict(zip(keys, (i % 7, i % 10) if len(keys) == 2 else (i % 10,)))
        yield i, {"id": str(i), "image": image, **labels}

def split_generators(self, _):
    keys = self._cifar_info.label_keys
    self.info.features["label"].names = [f"class{i}" for i in range(10 if len(keys) == 1 else 100)]
    return {"train": generate(keys, 40), "test": generate(keys, 20)}

cifar.Cifar10._split_generators = split_generators
tfds_prepared._unreachable = lambda url: ""
print(*[sources.load_dataset(name, data_dir=sys.argv[1]).fingerprint() for name in ("cifar10", "cifar100")])
"""


def run(script, *arguments):
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Tiny cifar10 and cifar100, "downloaded" by load_dataset and written by TFDS; also the loaded data."""
    if not all(map(importlib.util.find_spec, ("tensorflow_datasets", "tensorflow"))):
        pytest.skip("TFDS writes with TensorFlow")
    data_dir = tmp_path_factory.mktemp("tfds")
    # In a separate process, because TFDS loads TensorFlow to write.
    return data_dir, run(WRITE, data_dir).split()[-2:]


@pytest.fixture
def copy(prepared, tmp_path):
    """A copy of the tiny cifar10 to damage: its data_dir and the directory of its version."""
    shutil.copytree(prepared[0] / "cifar10", tmp_path / "cifar10")
    (version,) = (tmp_path / "cifar10").iterdir()
    return tmp_path, version


@pytest.fixture
def offline(monkeypatch):
    """All name look-ups fail, and TFDS must not try to download."""
    tfds = pytest.importorskip("tensorflow_datasets")

    def refuse(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for variable in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", lambda *_, **__: pytest.fail("tried"))


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_is_read_as_written(prepared, name, classes):
    data_dir, fingerprints = prepared
    dataset = load_dataset(name, data_dir=str(data_dir))
    assert dataset.name == name and dataset.class_names == tuple(f"class{i}" for i in range(classes))
    assert sources.IMAGES[name] == ((32, 32, 3), classes)
    for split, count in ((dataset.train, 40), (dataset.test, 20)):
        assert split.images.shape == (count, 32, 32, 3) and split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32
        assert sorted(split.images[:, 5, 5, 0]) == list(range(count))
        np.testing.assert_array_equal(split.images[:, 0, 0], np.broadcast_to((255, 0, 128), (count, 3)))
        np.testing.assert_array_equal(split.labels, split.images[:, 5, 5, 0] % 10)
    assert dataset.fingerprint() == fingerprints[name == "cifar100"]


def test_reading_in_several_batches(prepared, monkeypatch):
    import tensorflow_datasets as tfds

    source = tfds.data_source("cifar10", data_dir=prepared[0], split="train", download=False)
    whole = [example["label"] for example in source]
    decoded = []
    monkeypatch.setattr(sources, "BATCH", 7)
    pillows = Image.open
    monkeypatch.setattr(sources.Image, "open", lambda *args, **options: decoded.append(1) or pillows(*args, **options))
    assert load_dataset("cifar10", data_dir=str(prepared[0])).train.labels.tolist() == whole
    assert len(decoded) == 60


def test_reading_needs_neither_tensorflow_nor_network(prepared):
    script = """
        import socket, sys
        from importlib.machinery import PathFinder
        socket.socket.connect = None
        find = PathFinder.find_spec
        PathFinder.find_spec = lambda name, *rest: None if name == "tensorflow" else find(name, *rest)
        from regnet_flax.data import sources
        print(sources.load_dataset("cifar10", data_dir=sys.argv[1]).fingerprint())
    """
    assert run(script, prepared[0]).strip() == prepared[1][0]


def test_a_converted_copy_is_read(copy, prepared):
    # The state after `tfds convert_format` has added ArrayRecord files to a TFRecord copy.
    info = json.loads((copy[1] / "dataset_info.json").read_text())
    info |= {"fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]}
    (copy[1] / "dataset_info.json").write_text(json.dumps(info))
    assert load_dataset("cifar10", data_dir=str(copy[0])).fingerprint() == prepared[1][0]


def test_a_copy_in_tfrecord_form(copy):
    info = json.loads((copy[1] / "dataset_info.json").read_text())
    (copy[1] / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    message = error_of("cifar10", data_dir=str(copy[0]))
    assert f"tfds convert_format --dataset_version_dir={copy[1]} --out_file_format=array_record" in message
    assert "apache-beam mlcroissant" in message


def test_damaged_copies(copy):
    data_dir, version = copy
    (records,) = version.glob("*-train.*")
    content = bytearray(records.read_bytes())
    content[content.index(b"PNG")] ^= 1
    records.write_bytes(content)
    assert f"copy of cifar10 in {version} cannot be read" in error_of("cifar10", data_dir=str(data_dir))
    records.unlink()
    assert f"copy of cifar10 in {version} cannot be read" in error_of("cifar10", data_dir=str(data_dir))
    (version / "dataset_info.json").write_text("{")
    assert "cannot be opened" in error_of("cifar10", data_dir=str(data_dir))
    (version / "dataset_info.json").unlink()
    assert f"{version} has no dataset_info.json" in error_of("cifar10", data_dir=str(data_dir))


def test_missing_with_no_network(offline, tmp_path):
    message = error_of("cifar100", data_dir=str(tmp_path))
    assert message.startswith(f"cifar100 is not in {tmp_path}/cifar100/") and "www.cs.toronto.edu cannot" in message
    assert "(ConnectionError)" in message
    for way in ("copy it to", "--config.dataset.data_dir=", "--config configs/folder.py"):
        assert way in message


def test_a_name_look_up_that_hangs_is_left_alone(offline, monkeypatch, tmp_path):
    released = threading.Event()

    def hang(*_, **__):
        released.wait(20)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    monkeypatch.setattr(tfds_prepared, "CONNECT_SECONDS", 0.2)
    start = time.monotonic()
    assert "(no answer in 0.2 s)" in error_of("cifar10", data_dir=str(tmp_path))
    assert time.monotonic() - start < 10
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "connect")
    assert thread.daemon
    released.set()


def test_a_download_that_fails(monkeypatch, tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")

    def fail(self, **_):
        raise RuntimeError("checksum of the archive\ndiffers\n" + "x" * 1000)

    monkeypatch.setattr(tfds_prepared, "_unreachable", lambda url: "")
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    message = error_of("cifar10", data_dir=str(tmp_path))
    assert "download failed (RuntimeError: checksum of the archive differs xxx" in message
    assert "--config configs/folder.py" in message


def test_any_answer_is_a_network(monkeypatch):
    requests = pytest.importorskip("requests")
    monkeypatch.setattr(requests, "head", lambda url, timeout: requests.Response())
    assert tfds_prepared._unreachable("https://example.org/") == ""


def test_a_data_dir_that_does_not_exist(offline, tmp_path):
    assert f"data_dir={tmp_path / 'typo'} is not a directory" in error_of("cifar10", data_dir=str(tmp_path / "typo"))


def test_tfds_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    message = error_of("cifar10")
    assert 'pip install "regnet-flax[tfds]"' in message and "--config configs/folder.py" in message


@pytest.mark.fault("preparing a data set without TensorFlow")
@pytest.mark.parametrize("name", ["cifar10", "imagenet"])
def test_tensorflow_not_installed(name, offline, monkeypatch, tmp_path, capsys):
    find = PathFinder.find_spec
    monkeypatch.setattr(
        PathFinder, "find_spec", lambda name, *rest: None if name == "tensorflow" else find(name, *rest)
    )
    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    arguments = [
        f"--config=configs/{name}.py",
        f"--config.dataset.data_dir={tmp_path}",
        f"--workdir={tmp_path / 'run'}",
    ]
    assert main.main(arguments) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and f"is not in {tmp_path / name}" in error
    assert 'pip install "regnet-flax[tfds]"' in error and "--config configs/folder.py" in error
