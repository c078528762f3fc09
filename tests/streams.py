"""Streamed data sets: a folder of photographs, a tiny imagenet2012, and their batches."""

import importlib.util
import io
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from helpers import ROOT
from regnet_flax.data.stream import CROP, Stream, open_stream

SIZE = 16
# The numbers in the data's order: class a, then class b.
TRAIN, TEST = [*range(0, 13, 2), *range(1, 13, 2)], [14, 16, 18, 13, 15, 17, 19]


def jpeg(number, size=(40, 30)):
    """Makes a JPEG whose red value is ten times its number."""
    image = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image[..., 0] = 10 * number
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def number_of(image):
    return round(image[..., 0].mean() / 10)


@pytest.fixture
def folder(tmp_path):
    """A folder with numbers 0 to 12 for training and 13 to 19 for testing; class b has the odd numbers."""
    for number in range(20):
        path = tmp_path / ("train" if number < 13 else "val") / "ab"[number % 2] / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    return tmp_path


def opened(folder, **options):
    options = {"image_size": SIZE, "augment": (CROP,), "in_memory": "never"} | options
    return open_stream("folder", data_dir=str(folder), **options)


def read(make, indices, workers=0, prefetch=2):
    """Returns copies of a stream's batches."""
    stream = Stream(make, indices, workers=workers, prefetch=prefetch)
    try:
        return [{name: np.array(array) for name, array in batch.items()} for batch in stream]
    finally:
        stream.close()


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            assert batch[name].dtype == other[name].dtype
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


PREPARE = """
import sys
from regnet_flax.data.stream import open_stream
open_stream("imagenet2012", data_dir=sys.argv[1], image_size=16)
"""


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_archives(directory):
    """Writes ImageNet's two archives, with 24 training images of two classes and 7 validation images."""
    directory.mkdir(parents=True)
    with tarfile.open(directory / "ILSVRC2012_img_train.tar", "w") as outer:
        for wnid, numbers in (("n01440764", range(0, 24, 2)), ("n01443537", range(1, 24, 2))):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for number in numbers:
                    add(tar, f"{wnid}_{number}.JPEG", jpeg(number))
            add(outer, f"{wnid}.tar", inner.getvalue())
    with tarfile.open(directory / "ILSVRC2012_img_val.tar", "w") as tar:
        for number in range(7):
            add(tar, f"ILSVRC2012_val_{number + 1:08}.JPEG", jpeg(number))


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory):
    """A data_dir with a tiny imagenet2012 as ArrayRecord, written by TFDS itself."""
    if not all(map(importlib.util.find_spec, ("tensorflow_datasets", "tensorflow"))):
        pytest.skip("TFDS writes with TensorFlow")
    data_dir = tmp_path_factory.mktemp("tfds")
    write_archives(data_dir / "downloads/manual")
    # In a separate process, because TFDS loads TensorFlow to write.
    command = [sys.executable, "-c", PREPARE, str(data_dir)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return data_dir
