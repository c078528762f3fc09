"""Real-world image folders: what is read, what is skipped, and the line that says so."""

import shutil
import struct
import sys
import types
import unicodedata
import zlib

import numpy as np
import pytest
from PIL import Image

from regnet_flax.data import photos
from regnet_flax.data.batches import EvalBatches, FolderRecords
from regnet_flax.data.folder.listing import list_image_folder
from regnet_flax.data.sources import load_dataset
from regnet_flax.data.stream import open_stream
from regnet_flax.errors import DataError

RED, BLUE = (250, 0, 0), (0, 0, 250)


def draw(path, colour=RED, mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).convert(mode).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    """A folder with two classes, two train images and one test image each."""
    for name, colour in (("ant", RED), ("bee", BLUE)):
        for path in ("train/{}/a.png", "train/{}/b.png", "test/{}/c.png"):
            draw(tmp_path / path.format(name), colour)
    return tmp_path


def read(folder, **options):
    return load_dataset("folder", data_dir=str(folder), image_size=8, **options)


def test_photos_in_folders_below_a_class_are_read_and_other_files_are_counted(folder):
    draw(folder / "train/ant/2024/june/d.png")
    draw(folder / "train/ant/.ipynb_checkpoints/d.png")
    for name in ("x.heic", "y.HEIC", "z", ".DS_Store"):
        (folder / "train/bee" / name).write_bytes(b"")
    (folder / "train/ant/2024/notes.txt").write_text("")
    (folder / "train/ant/2024/back").symlink_to(folder)
    dataset = read(folder)
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1]
    uses, note = dataset.notes
    assert uses == f"{folder}: train on train/, test on test/"
    heic = '; HEIC needs the extra [heic]: pip install "regnet-flax[heic]"' * (not photos.reads_heic())
    assert photos.reads_heic() or note == f"{folder}: 4 files ignored: .heic 2, .txt 1, no suffix 1{heic}"
    for path in (folder / "train/ant").rglob("*.png"):
        path.rename(path.with_suffix(".raw"))
    with pytest.raises(DataError, match=r"train/ant has no images \(.jpg .*\): 4 files ignored: .raw 3, .txt 1; add"):
        read(folder)


def test_heic_is_read_where_pillow_heif_is_installed(folder, monkeypatch):
    photos.reads_heic.cache_clear()
    calls = []
    fake = types.SimpleNamespace(register_heif_opener=lambda: calls.append(1))
    monkeypatch.setitem(sys.modules, "pillow_heif", fake)
    try:
        draw(folder / "train/ant/c.heic", format="PNG")  # Pillow detects the format from the content
        assert len(read(folder).train.labels) == 5 and calls == [1]
    finally:
        photos.reads_heic.cache_clear()


def test_classes_of_one_split_only_are_said(folder):
    for name in ("cat", "dog"):
        draw(folder / f"test/{name}/a.png")
    draw(folder / "train/eel/a.png")
    draw(folder / "valid/ant/a.png")
    (folder / "old").mkdir()
    listing = list_image_folder(str(folder))
    assert listing.uses.endswith(": train on train/, test on test/, validation on valid/; not used: old/")
    assert listing.notes == (
        f"{folder}: cat, dog in test/ are not trained on: 2 images left out",
        f"{folder}: test/ has no images of eel, so it does not evaluate this class",
        f"{folder}: valid/ has no images of bee, eel, so it does not evaluate them",
    )
    dataset = read(folder)
    assert dataset.class_names == ("ant", "bee", "eel") and dataset.test.labels.tolist() == [0, 1]
    assert dataset.validation is not None and dataset.validation.labels.tolist() == [0]


def test_a_folder_that_is_not_divided_is_divided(tmp_path):
    for name, count in (("ant", 10), ("bee", 5)):
        for number in range(count):
            draw(tmp_path / name / f"{number}.png", (number, 0, 0))
    dataset = read(tmp_path)
    assert np.bincount(dataset.train.labels).tolist() == [8, 4] and np.bincount(dataset.test.labels).tolist() == [2, 1]
    seen = np.concatenate([split.images[:, 0, 0, 0] for split in (dataset.train, dataset.test)])
    assert sorted(seen) == sorted([*range(10), *range(5)])
    assert "has no train/ and test/: 0.2 of each class for testing (dataset.validation)" in dataset.notes[0]
    assert read(tmp_path).fingerprint() == dataset.fingerprint() != read(tmp_path, seed=1).fingerprint()
    half = read(tmp_path, validation=0.5)
    assert half.validation is None and np.bincount(half.test.labels).tolist() == [5, 2]
    with pytest.raises(DataError, match="has only 10 images to divide"):
        read(tmp_path, validation=0.95)
    (tmp_path / "ant").rename(tmp_path / "Training")
    with pytest.raises(DataError, match="has Training/: expected train/<class>"):
        read(tmp_path)


def test_a_model_is_evaluated_on_a_folder_without_training_images(folder):
    shutil.rmtree(folder / "train")
    shutil.rmtree(folder / "test/ant")
    dataset = read(folder, class_names=("ant", "bee"))
    assert dataset.test.labels.tolist() == [1] and not len(dataset.train.labels)
    # There are none to hold out either.
    options = {"class_names": ("ant", "bee"), "validation": 0.1}
    assert read(folder, **options).test.labels.tolist() == [1]
    streamed = open_stream("folder", data_dir=str(folder), image_size=8, in_memory="never", **options)
    assert streamed.size("test") == 1
    with pytest.raises(DataError, match="no test images of the classes cat, dog"):
        read(folder, class_names=("cat", "dog"))


def test_one_class_whatever_the_unicode_form(folder):
    for split, form in (("train", "NFC"), ("test", "NFD"), ("train", "NFD")):
        draw(folder / split / unicodedata.normalize(form, "abeille été") / f"{form}.png")
    dataset = read(folder)
    assert dataset.class_names == ("abeille été", "ant", "bee")
    assert dataset.train.labels.tolist() == [0, 0, 1, 1, 2, 2] and dataset.test.labels.tolist() == [0, 1, 2]


def alpha(path, mode="RGBA"):
    """Writes a black image with a disc in the alpha channel."""
    y, x = np.mgrid[:8, :8]
    disc = np.where((y - 3.5) ** 2 + (x - 3.5) ** 2 < 9, 255, 0).astype(np.uint8)
    pixels = np.zeros((8, 8, len(mode)), np.uint8)
    pixels[..., -1] = disc
    Image.fromarray(pixels, mode).save(path)
    return disc


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
def test_transparent_parts_are_shown_on_white_and_said_once(folder):
    disc = alpha(folder / "train/ant/a.png")
    alpha(folder / "train/ant/b.png", "LA")
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.save(folder / "train/bee/a.png", transparency=1)
    draw(folder / "train/bee/b.png", mode="RGBA")  # opaque
    dataset = read(folder)
    for index in (0, 1):
        np.testing.assert_array_equal(dataset.train.images[index], 255 - np.repeat(disc[..., None], 3, -1))
    assert (dataset.train.images[2] == 255).all() and tuple(dataset.train.images[3, 0, 0]) == RED
    assert dataset.notes[1:] == (photos.TRANSPARENT,)

    listing = list_image_folder(str(folder))
    records = FolderRecords(listing.root, listing.splits["train"], {"ant": 0, "bee": 1})
    batch = EvalBatches(records, 8, crop=False, strict=False, batch_size=4)(0)
    np.testing.assert_array_equal(batch["images"], dataset.train.images)
    assert batch["skipped"] == photos.TRANSPARENT


@pytest.mark.parametrize("colour", [False, True])
def test_twelve_bits_in_sixteen_are_said(folder, colour):
    values = np.linspace(0, 4095, 64).reshape(8, 8).astype(np.uint16)
    path = folder / "train/ant/a.png"
    if colour:  # Pillow cannot write such a PNG: 8 × 8 pixels of 3 × 16 bits
        rows = b"".join(b"\0" + row.tobytes() for row in np.repeat(values[..., None], 3, -1).astype(">u2"))

        def chunk(kind, content):
            return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

        header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    else:
        Image.fromarray(values).save(path)
    assert read(folder).notes[1:] == (photos.DARK,)
    Image.fromarray(values * 16).save(path)
    assert read(folder).notes[1:] == ()


def test_a_streamed_folder_with_a_dangling_link(folder):
    link = folder / "train/ant/x.png"
    link.symlink_to(folder / "nowhere.png")
    listing = list_image_folder(str(folder))
    records = FolderRecords(listing.root, listing.splits["train"], {"ant": 0, "bee": 1})
    assert len(records) == 5 and len(b"".join(records.identity())) > 0
    batch = EvalBatches(records, 8, crop=False, strict=False, batch_size=5)(0)
    assert batch["mask"].tolist() == [True, True, False, True, True]
    assert batch["skipped"].startswith(f"{link}: ") and "\n" not in batch["skipped"]
