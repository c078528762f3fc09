"""Streamed data sets: the same batches for any workers, and files that do not decode."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import alive, children, metrics, run_program, wait_until
from regnet_flax.data import batches, photos, stream
from regnet_flax.data.batches import epoch_order
from regnet_flax.data.sources import channel_statistics, load_dataset
from regnet_flax.data.stream import CROP, Stream, open_stream
from regnet_flax.errors import DataError, StreamError
from streams import SIZE, TEST, TRAIN, assert_same, jpeg, number_of, opened, read

ROOT = Path(__file__).parents[1]
# Batches


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.thorough), 2])
def test_any_number_of_workers_makes_the_same_batches_from_any_step(folder, workers):
    (folder / "train/a/04.jpg").write_bytes(b"no photograph")
    make = opened(folder).train_batches(seed=3, batch_size=4)
    batches = [make(step) for step in range(7)]
    expected = [{name: np.array(array) for name, array in batch.items()} for batch in batches[2:]]
    assert any("04.jpg" in str(batch["skipped"]) for batch in expected)
    assert_same(read(make, range(2, 7), workers), expected)


def test_an_epoch_has_each_example_at_most_once_and_epochs_differ(folder):
    make = opened(folder).train_batches(seed=0, batch_size=4)
    epochs = [[make(step) for step in range(first, first + 3)] for first in (0, 3)]
    orders = []
    for epoch in epochs:
        order = np.concatenate([batch["examples"] for batch in epoch])
        assert len(set(order)) == 12 and order.dtype == np.int32
        orders.append(order.tolist())
        for batch in epoch:
            assert [number_of(image) for image in batch["images"]] == [TRAIN[i] for i in batch["examples"]]
            assert batch["labels"].tolist() == [TRAIN[i] % 2 for i in batch["examples"]]
            assert batch["images"].dtype == np.uint8 and batch["labels"].dtype == np.int32
    assert orders[0] != orders[1]
    other = opened(folder).train_batches(seed=1, batch_size=4)(0)
    assert other["examples"].tolist() != orders[0][:4]


def test_the_same_example_is_cropped_otherwise_in_another_epoch_and_not_without_the_crop(folder):
    def crops(augment):
        make = opened(folder, augment=augment).train_batches(seed=0, batch_size=13)
        batches = make(0), make(1)
        return [{i: image for i, image in zip(b["examples"], b["images"], strict=True)} for b in batches]

    first, second = crops((CROP,))
    assert all((first[i] != second[i]).any() for i in first)
    first, second = crops(("flip",))
    for i in first:
        np.testing.assert_array_equal(first[i], second[i])
        whole = Image.open(folder / "train" / "ab"[TRAIN[i] % 2] / f"{TRAIN[i]:02}.jpg")
        np.testing.assert_array_equal(first[i], np.asarray(whole.resize((SIZE, SIZE), Image.Resampling.BILINEAR)))


def test_the_order_and_the_crops_are_those_of_every_version():
    # A run that resumes under another version of NumPy or of this package must see the same batches.
    assert epoch_order(0, 0, 10).tolist() == [3, 7, 6, 4, 1, 0, 2, 8, 5, 9]
    random = np.random.RandomState((0, 0, 0)).random_sample((2, photos.UNIFORMS))
    assert photos.random_box(500, 375, random[1]) == (82, 100, 352, 338)


@pytest.mark.parametrize("split", ["train", "test"])
def test_processes_read_their_parts_of_the_same_batches(folder, split):
    dataset = opened(folder)

    def make(*args):
        return dataset.eval_batches(split, *args) if split == "test" else dataset.train_batches(5, *args)

    for k in range(3):
        whole = make(6)(k)
        parts = [make(6, process, 3)(k) for process in range(3)]
        for name in whole.keys() - {"skipped"}:
            assert len(parts[0][name]) == 2
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole[name])


@pytest.mark.parametrize(("batch_size", "processes"), [(1, 1), (3, 1), (7, 1), (4, 2), (10, 2)])
def test_every_test_example_counts_once(folder, batch_size, processes):
    dataset, numbers, labels = opened(folder), [], []
    for k in range(-(-dataset.size("test") // batch_size)):
        for process in range(processes):
            batch = dataset.eval_batches("test", batch_size, process, processes)(k)
            numbers += [number_of(image) for image, real in zip(batch["images"], batch["mask"], strict=True) if real]
            labels += batch["labels"][batch["mask"]].tolist()
    assert numbers == TEST and labels == [number % 2 for number in TEST]


# Files that do not decode


def test_a_damaged_photograph_is_left_out_and_named(folder):
    path = folder / "train/a/04.jpg"  # example 2; example 3 is number 6
    path.write_bytes(path.read_bytes()[:300])  # inside the tables, before any pixel
    (folder / "val/b/15.jpg").write_bytes(b"")
    dataset = opened(folder)
    batch = dataset.train_batches(seed=0, batch_size=13)(0)
    rows = {example: number_of(image) for example, image in zip(batch["examples"], batch["images"], strict=True)}
    assert rows[2] == 6 and [rows[i] for i in range(13) if i != 2] == [n for n in TRAIN if n != 4]
    assert re.fullmatch(rf"{path}: OSError: Truncated File Read", batch["skipped"])

    batch = dataset.eval_batches("test", 7)(0)
    assert [number_of(image) for image in batch["images"][batch["mask"]]] == [14, 16, 18, 13, 17, 19]
    assert "val/b/15.jpg: UnidentifiedImageError" in batch["skipped"] and "\n" not in batch["skipped"]


def test_a_named_pipe_and_a_newline_in_a_name_are_one_line_each(folder):
    pipe = folder / "val/a/14.jpg"
    pipe.unlink()
    os.mkfifo(pipe)
    (folder / "val/b/15.jpg").rename(folder / "val/b/1\n5.jpg")
    (folder / "val/b/1\n5.jpg").write_bytes(b"")
    # Whoever opens the pipe is released after a while.
    timer = threading.Timer(20, lambda: os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)))
    timer.start()
    batch = opened(folder).eval_batches("test", 7)(0)
    timer.cancel()
    first, second = batch["skipped"].splitlines()
    assert first == f"{pipe}: ValueError: not a regular file" and r"1\n5.jpg: UnidentifiedImageError" in second
    assert batch["mask"].sum() == 5


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_photograph_is_an_error_if_strict(folder, workers):
    (folder / "train/b/05.jpg").write_bytes(b"no photograph")
    make = opened(folder, strict=True).train_batches(seed=0, batch_size=13)
    with pytest.raises(DataError, match=r"train/b/05.jpg does not decode \(.*strict=False") as caught:
        read(make, range(3), workers)
    assert "\n" not in str(caught.value)


def test_nothing_that_decodes(folder, monkeypatch):
    for path in folder.glob("train/*/*"):
        path.write_bytes(b"no photograph")
    with pytest.raises(DataError, match="nor do 12 images before it decode"):
        opened(folder).train_batches(seed=0, batch_size=4)(0)
    with pytest.raises(DataError, match="none of 13 training images decodes"):
        opened(folder).statistics()
    monkeypatch.setattr(batches, "SUBSTITUTES", 5)
    with pytest.raises(DataError, match="nor do 4 images"):
        opened(folder).train_batches(seed=0, batch_size=4)(0)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # a warning, as in a user's process
def test_decompression_bombs_do_not_decode_and_warnings_stay_warnings(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 30 - 1)
    before = list(warnings.filters)
    with pytest.raises(DataError, match="DecompressionBombError"):
        read(opened(folder).train_batches(seed=0, batch_size=4), range(1))
    assert warnings.filters == before, "they are the whole process's"


# The data set


def test_a_folders_statistics_are_those_of_a_fixed_sample(folder, monkeypatch):
    dataset = opened(folder)
    box = lambda w, h: photos.centre_box(w, h, SIZE)  # noqa: E731
    images = np.stack([photos.read_crop(io.BytesIO(jpeg(number)), SIZE, box) for number in TRAIN])
    assert dataset.statistics() == channel_statistics(images)
    monkeypatch.setattr(stream, "SAMPLE", 4)
    assert dataset.statistics() == channel_statistics(images[[0, 3, 6, 9]])
    assert dataset.image_shape == (SIZE, SIZE, 3) and dataset.class_names == ("a", "b")


def test_the_fingerprint_sees_names_and_sizes(folder):
    before = opened(folder).fingerprint()
    assert opened(folder, image_size=32).fingerprint() == before
    path = folder / "val/a/14.jpg"
    data = path.read_bytes()
    path.write_bytes(data + b" ")
    longer = opened(folder).fingerprint()
    path.write_bytes(data)
    assert opened(folder).fingerprint() == before
    path.rename(path.with_name("x.jpg"))
    assert len({before, longer, opened(folder).fingerprint()}) == 3


def test_the_fingerprint_is_that_of_every_version(folder):
    for path in folder.glob("*/*/*"):
        path.write_bytes(b"x" * int(path.stem))  # only the sizes matter, not the contents
    assert opened(folder).fingerprint() == "a42031f3296857c1"


def test_the_same_images_are_held_out_as_in_memory(folder):
    options = {"validation": 4, "seed": 5, "augment": ("flip",)}
    dataset = opened(folder, **options)
    held = load_dataset("folder", data_dir=str(folder), image_size=SIZE, validation=4, seed=5)
    for split, size in (("train", 9), ("validation", 4), ("test", 7)):
        assert dataset.size(split) == size
        batch = dataset.eval_batches(split, size)(0)
        np.testing.assert_array_equal(batch["images"], getattr(held, split).images)
        np.testing.assert_array_equal(batch["labels"], getattr(held, split).labels)
    assert dataset.evaluated == "validation" and dataset.statistics() == held.statistics()
    images = dataset.images("validation", np.array([3, 1]))
    np.testing.assert_array_equal(images, held.validation.images[[3, 1]])

    make = dataset.train_batches(seed=0, batch_size=9)
    batch = make(0)
    assert sorted(batch["examples"]) == list(range(9))
    np.testing.assert_array_equal(batch["images"], held.train.images[batch["examples"]])
    assert_same(read(make, range(2), workers=1), [{k: np.array(v) for k, v in make(i).items()} for i in range(2)])

    others = [{"validation": 4}, {"validation": 3, "seed": 5}, {"seed": 5}]
    assert len({opened(folder, **other).fingerprint() for other in (options, *others)}) == 4
    assert opened(folder, **options | {"validation": 0.3}).fingerprint() == dataset.fingerprint()


def test_a_folder_with_val_and_test_is_streamed_as_three_splits(folder):
    (folder / "test/b").mkdir(parents=True)
    (folder / "test/b/1.jpg").write_bytes(jpeg(1))
    dataset = opened(folder)
    assert [dataset.size(split) for split in ("train", "validation", "test")] == [13, 7, 1]
    assert dataset.evaluated == "validation"
    assert [number_of(image) for image in dataset.images("validation", np.arange(7))] == TEST
    before = dataset.fingerprint()
    (folder / "val/b/13.jpg").write_bytes(jpeg(13) + b" ")
    assert opened(folder).fingerprint() != before
    with pytest.raises(DataError, match="dataset.validation is 2, but .* val/ beside test/"):
        opened(folder, validation=2)


@pytest.mark.parametrize(("validation", "reason"), [(13, "13 training images"), (12, "all images of 1 of the classes")])
@pytest.mark.fault("more images to hold out than there are")
def test_too_many_images_held_out(folder, validation, reason):
    with pytest.raises(DataError, match=f"dataset.validation is {validation}: .*{reason}") as caught:
        opened(folder, validation=validation)
    assert "\n" not in str(caught.value)


def test_what_is_streamed(folder, monkeypatch):
    assert open_stream("digits", data_dir="", image_size=0) is None
    assert opened(folder, in_memory="auto", augment=()) is None
    assert opened(folder, in_memory="always", augment=()) is None
    assert opened(folder, in_memory="never", augment=()) is not None
    assert opened(folder, in_memory="auto") is not None
    monkeypatch.setattr(stream, "FOLDER_BYTES", 20 * SIZE * SIZE * 3)
    assert opened(folder, in_memory="auto", augment=()) is None
    monkeypatch.setattr(stream, "FOLDER_BYTES", 20 * SIZE * SIZE * 3 - 1)
    assert opened(folder, in_memory="auto", augment=()) is not None
    with pytest.raises(DataError, match="set --config.dataset.image_size"):
        opened(folder, image_size=0)
    with pytest.raises(DataError, match="num_classes=3, but folder has 2 classes"):
        opened(folder, num_classes=3)


def test_grain_not_installed(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(DataError, match="pip install grain, or hold a folder in memory"):
        read(opened(folder).train_batches(seed=0, batch_size=4), range(1))


# Worker processes


def test_a_worker_heeds_no_signal_meant_for_the_run_and_its_death_is_one_line(folder):
    before = set(children(os.getpid()))
    stream = Stream(opened(folder).train_batches(0, 4), range(10**6), workers=1, prefetch=1)
    try:
        next(stream)
        (worker,) = set(children(os.getpid())) - before
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(worker, number)
        for _ in range(10):
            next(stream)
        assert stream.next == 11 and alive([worker])
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(StreamError, match=r"reading the data stopped \(.*exit code -9") as caught:
            for _ in range(10):
                next(stream)
        assert "\n" not in str(caught.value)
    finally:
        stream.close()
    assert not alive([worker])


ENDLESS = """
import sys
sys.path.insert(0, "tests")
from streams import opened
from regnet_flax.data.stream import Stream

if __name__ == "__main__":
    stream = Stream(opened(sys.argv[1]).train_batches(0, 4), range(10**6), workers=2, prefetch=1)
    next(stream)
    print("ready", flush=True)
    input()
"""


def test_workers_end_with_a_parent_that_was_killed(folder, tmp_path):
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    command = [sys.executable, str(script), str(folder)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=env, text=True, **pipes) as parent:
        assert parent.stdout.readline() == "ready\n"
        wait_until(lambda: len(children(parent.pid)) == 2)  # the first batch may precede the second worker
        workers = children(parent.pid)
        assert len(alive(workers)) == 2
        parent.kill()
    wait_until(lambda: not alive(workers))


# ImageNet from TFDS


def test_imagenet_is_read_as_tfds_wrote_it(imagenet):
    dataset = open_stream("imagenet2012", data_dir=str(imagenet), image_size=0, augment=(CROP,))
    assert (dataset.size("train"), dataset.size("test"), len(dataset.class_names)) == (24, 7, 1000)
    assert dataset.class_names[:2] == ("n01440764", "n01443537")
    assert dataset.image_shape == (224, 224, 3)
    assert dataset.statistics() == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    make = open_stream("imagenet2012", data_dir=str(imagenet), image_size=SIZE).train_batches(seed=0, batch_size=24)
    batch = make(0)
    numbers = [number_of(image) for image in batch["images"]]
    assert sorted(numbers) == list(range(24)) and batch["labels"].tolist() == [n % 2 for n in numbers]
    assert batch["skipped"] == ""
    held = open_stream("imagenet2012", data_dir=str(imagenet), image_size=SIZE, validation=5)
    assert [held.size(split) for split in ("train", "validation", "test")] == [19, 5, 7]
    both = [held.images(split, np.arange(held.size(split))) for split in ("train", "validation")]
    assert sorted(map(number_of, np.concatenate(both))) == list(range(24))
    assert held.fingerprint() != dataset.fingerprint()
    other = open_stream("imagenet2012", data_dir=str(imagenet), image_size=SIZE)
    assert other.fingerprint() == dataset.fingerprint()
    assert_same(read(make, range(3), workers=1), [{k: np.array(v) for k, v in make(i).items()} for i in range(3)])


@pytest.mark.thorough
def test_imagenet_trains_as_tfds_wrote_it(imagenet, tmp_path):
    fields = {"model.name": "resnet8", "model.overrides.width": 4, "dataset.data_dir": imagenet}
    fields |= {
        "dataset.name": "imagenet2012",
        "dataset.image_size": SIZE,
        "dataset.augment": "('random_resized_crop',)",
    }
    fields |= {"train.batch_size": 8, "train.epochs": 1, "eval.batch_size": 3, "optimizer.schedule": "constant"}
    fields |= {"dataset.mean": "()", "dataset.std": "()", "dataset.workers": 0}
    run = ["--config", ROOT / "configs/rnn_photos.py", "--workdir", tmp_path / "run"]
    done = run_program(*run, *(f"--config.{name}={value}" for name, value in fields.items()), check=0)
    assert "imagenet2012: 24 training and 7 test images of 1000 classes, 16×16×3, streamed" in done.stdout
    assert done.stderr == ""
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["dataset"]["mean"] == [0.485, 0.456, 0.406] and config["dataset"]["num_classes"] == 1000
    (last,) = [line for line in metrics(tmp_path / "run") if line["step"] == 3]
    assert 0 <= last["eval_accuracy"] <= last["eval_top5_accuracy"] <= 1 and last["eval_loss"] > 0
    out = run_program("--mode", "eval", "--workdir", tmp_path / "run", check=0).stdout
    assert "over 7 images" in out


def test_imagenet_that_is_missing(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(DataError, match="registered users only") as caught:
        open_stream("imagenet2012", data_dir=str(tmp_path), image_size=0)
    message = str(caught.value)
    assert "\n" not in message and "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar" in message
    assert str(tmp_path / "downloads/manual") in message


def test_a_damaged_copy_of_imagenet(imagenet, tmp_path):
    import shutil

    shutil.copytree(imagenet / "imagenet2012", tmp_path / "imagenet2012")
    (file,) = tmp_path.glob("imagenet2012/*/*train.array_record*")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DataError, match="imagenet2012 in .* cannot be read .*; copy or prepare it again") as caught:
        dataset = open_stream("imagenet2012", data_dir=str(tmp_path), image_size=SIZE)
        read(dataset.train_batches(seed=0, batch_size=24), range(1))
    assert "\n" not in str(caught.value)
