"""How many photographs per second one core reads, decodes and crops to 224×224, against PyTorch and tf.data.

    python benchmarks/input.py DIR --out input.json        # DIR holds JPEGs, at any depth

The pipelines run in turn in this process on one core, in rounds of EPOCHS epochs from start to end. Rates are images
per second of the process's CPU time, which other programs on the machine disturb less, and per second of wall time.

- grain: data/stream.py, one thread; uint8 batches, to be flipped and normalised on the device.
- torch: PyTorch's DataLoader, num_workers=0; torchvision's RandomResizedCrop and RandomHorizontalFlip for Pillow
  images, and PILToTensor: uint8.
- torch_float: the same, with torchvision's usual ToTensor and Normalize.
- tf_data: tf.data with tf.image.decode_and_crop_jpeg, which decodes only the crop, and tf.image.resize, which does not
  antialias; random crops and flips; uint8.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import pathlib
import random
import time

import numpy as np
import tensorflow as tf
import torch
from PIL import Image

from regnet_flax.data import batches, photos, stream
from regnet_flax.data.batches import FolderRecords
from regnet_flax.environment import processor

SIZE, BATCH, EPOCHS = 224, 32, 1


def grain_batches(files, seed):
    root = pathlib.Path(os.path.commonpath(files))
    records = FolderRecords(root, {"": files}, {"": 0})
    make = batches.TrainBatches(records, SIZE, True, False, BATCH, seed=seed)
    read = stream.Stream(make, range(len(files) // BATCH * EPOCHS), workers=0, prefetch=2)
    for batch in read:
        yield batch["images"]
    read.close()


class Files(torch.utils.data.Dataset):
    """torchvision's ImageFolder, RandomResizedCrop, RandomHorizontalFlip and tensors."""

    def __init__(self, files, floats):
        self.files, self.floats = files, floats

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        with open(self.files[index], "rb") as file:
            image = Image.open(file).convert("RGB")
        left, top, right, bottom = photos.random_box(*image.size, [random.random() for _ in range(photos.UNIFORMS)])
        image = image.crop((left, top, right, bottom)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        array = torch.from_numpy(np.array(image, copy=True)).permute(2, 0, 1).contiguous()
        if self.floats:
            array = array.to(torch.float32).div(255)
            mean, std = (torch.tensor(v)[:, None, None] for v in (stream.IMAGENET_MEAN, stream.IMAGENET_STD))
            array = array.sub_(mean).div_(std)
        return array


def torch_batches(files, seed, floats=False):
    torch.manual_seed(seed)
    loader = torch.utils.data.DataLoader(Files(files, floats), BATCH, shuffle=True, num_workers=0, drop_last=True)
    for _ in range(EPOCHS):
        yield from loader


@functools.cache  # so that only the first round, which does not count, traces it
def tf_dataset(files):
    def load(file):
        data = tf.io.read_file(file)
        shape = tf.image.extract_jpeg_shape(data)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            shape,
            tf.zeros((1, 0, 4), tf.float32),
            min_object_covered=0,
            aspect_ratio_range=photos.RATIO,
            area_range=photos.AREA,
            max_attempts=photos.TRIES,
            use_image_if_no_bounding_boxes=True,
        )
        (y, x, _), (h, w, _) = tf.unstack(begin), tf.unstack(size)
        image = tf.image.decode_and_crop_jpeg(data, tf.stack([y, x, h, w]), channels=3)
        image = tf.image.random_flip_left_right(tf.image.resize(image, (SIZE, SIZE)))
        return tf.cast(tf.round(image), tf.uint8)

    dataset = tf.data.Dataset.from_tensor_slices(list(files)).shuffle(len(files))
    dataset = dataset.map(load, num_parallel_calls=1).batch(BATCH, drop_remainder=True).repeat(EPOCHS)
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    return dataset.with_options(options)


def tf_batches(files, seed):
    yield from tf_dataset(tuple(files)).as_numpy_iterator()


PIPELINES = {
    "grain": grain_batches,
    "torch": torch_batches,
    "torch_float": functools.partial(torch_batches, floats=True),
    "tf_data": tf_batches,
}


def measure(batches):
    """Returns images per second of CPU time and of wall time."""
    count = 0
    began = time.process_time(), time.perf_counter()
    for batch in batches:
        assert batch.shape[0] == BATCH
        count += BATCH
    return count / (time.process_time() - began[0]), count / (time.perf_counter() - began[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", help="write the figures to this JSON file")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    files = sorted(str(path) for path in arguments.directory.rglob("*.jpg"))
    rates = {name: [] for name in PIPELINES}
    for round_number in range(arguments.rounds + 1):
        names = list(PIPELINES)
        for name in names if round_number % 2 else names[::-1]:
            rate = measure(PIPELINES[name](files, round_number))
            if round_number:  # the first one is a warm-up
                rates[name].append(rate)
    ours = np.array(rates["grain"])
    results = {"photographs": len(files), "size": SIZE, "batch": BATCH, "rounds": arguments.rounds, "pipelines": {}}
    for name, values in rates.items():
        cpu, clock = np.median(values, axis=0)
        ratios = ours[:, 0] / np.array(values)[:, 0]
        results["pipelines"][name] = {
            "images_per_cpu_second": round(float(cpu), 1),
            "images_per_second": round(float(clock), 1),
            "grain_to_this": round(float(np.median(ratios)), 3),
            "grain_to_this_spread": [round(float(ratios.min()), 3), round(float(ratios.max()), 3)],
        }
        print(f"{name}: {results['pipelines'][name]}", flush=True)
    packages = ("grain", "pillow", "numpy", "torch", "tensorflow-cpu")
    results["versions"] = {package: importlib.metadata.version(package) for package in packages}
    results["cpu"] = processor()
    if arguments.out:
        with open(arguments.out, "w") as file:
            json.dump(results, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
