"""--mode benchmark: the cost of a config's training step on this machine."""

from __future__ import annotations

import copy
import json
import logging
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from regnet_flax.analysis import summary
from regnet_flax.command_line import Options
from regnet_flax.config import check as config_lib
from regnet_flax.config.resolve import resolve
from regnet_flax.data import stream
from regnet_flax.data.folder import Split
from regnet_flax.data.sources import Dataset
from regnet_flax.modes.setup.models import build_model
from regnet_flax.modes.setup.trainers import make_trainer

logger = logging.getLogger("regnet_flax")

SECONDS, CALLS = 3.0, 5  # the least time and number of calls to measure
# Sides of the square matrices whose product measures the machine's rate.
MATRIX = {"cpu": 2048, "gpu": 8192, "tpu": 8192}


def benchmark(config: Any, devices: list[Any]) -> dict[str, Any]:
    """Measures the training step of a config on random images of its data set's size; reads no data set.

    Args:
      config: a nested config with the fields of configs/base.py.
      devices: the devices that share each batch.

    Returns:
      "model", "batch_size", "image_shape", "dtype", "device", "devices" and "steps_per_call"; "images_per_second" and
      "step_ms", from the median of the calls; "compile_s", the time to lower and compile, which a compilation cache
      shortens; "peak_bytes" on the first device, from the compiled step's own analysis if the device does not count;
      "flops_per_second", with two per multiply-add and three times those of a forward pass;
      "matmul_flops_per_second", the rate of a large matrix product in the same dtype on the first device, and
      "share_of_matmul", per device.

    Raises:
      ConfigError: a value is wrong.
    """
    config_lib.check_config(config, len(devices))
    shape, classes = config_lib.image_shape(config)
    config = copy.deepcopy(config)
    # The host does that crop, while it decodes photographs.
    config.dataset.augment = tuple(name for name in config.dataset.augment if name != stream.CROP)
    dataset = _random_images(2 * config.train.batch_size, shape, classes)
    config = resolve(config, dataset)
    trainer = make_trainer(config, dataset, devices)
    state, totals = trainer.initial_state(), None
    began = time.perf_counter()
    analysis = trainer.lower_training().compile().memory_analysis()
    compile_s = time.perf_counter() - began

    times, count = [], trainer.steps_per_call
    deadline = float("inf")
    while len(times) < CALLS or time.perf_counter() < deadline:
        began = time.perf_counter()
        state, totals, done = trainer.train(state, totals, 0, count)
        jax.block_until_ready((state, done))
        if deadline < float("inf"):
            times.append((time.perf_counter() - began) / count)
        else:  # the first call loads the compiled program
            deadline = time.perf_counter() + SECONDS
    seconds = float(np.median(times))
    images_per_second = config.train.batch_size / seconds
    parts = summary.summarize(build_model(config, devices), shape)
    flops = 3 * 2 * sum(part.multiply_adds for part in parts) * images_per_second
    matmul = matmul_rate(devices[0], config.dtype)
    return {
        "model": config.model.name,
        "batch_size": config.train.batch_size,
        "image_shape": list(shape),
        "dtype": config.dtype,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "steps_per_call": count,
        "images_per_second": round(images_per_second, 1),
        "step_ms": round(1000 * seconds, 3),
        "compile_s": round(compile_s, 2),
        "peak_bytes": _peak_bytes(devices[0], analysis),
        "flops_per_second": round(flops),
        "matmul_flops_per_second": round(matmul),
        "share_of_matmul": round(flops / matmul / len(devices), 4),
    }


def _random_images(count: int, shape: tuple[int, int, int], classes: int) -> Dataset:
    random = np.random.default_rng(0)
    labels = np.arange(count, dtype=np.int32) % classes
    split = Split(random.integers(0, 256, (count, *shape), np.uint8), labels)
    return Dataset("random images", split, split, tuple(map(str, range(classes))))


def _peak_bytes(device: Any, analysis: Any) -> int:
    counted = (device.memory_stats() or {}).get("peak_bytes_in_use")
    if counted is not None:
        return int(counted)
    sizes = analysis.argument_size_in_bytes, analysis.output_size_in_bytes, analysis.temp_size_in_bytes
    return int(sum(sizes) - analysis.alias_size_in_bytes)


def matmul_rate(device: Any, dtype: str, rounds: int = 5) -> float:
    """Returns the floating-point operations per second of a large matrix product, the best of some rounds."""
    side = MATRIX.get(device.platform, MATRIX["gpu"])
    a = jax.device_put(jnp.ones((side, side), dtype), device)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(a, a))
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        jax.block_until_ready(product(a, a))
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def run(config: Any, options: Options) -> None:
    """Prints the result of `benchmark` as one line of JSON."""
    config.dataset.data_dir = config.dataset.data_dir or "."  # nothing is read
    print(json.dumps(benchmark(config, jax.local_devices())))
