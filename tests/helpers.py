"""Helpers for several test modules: the program in this process, small configs, random variables, other processes."""

import contextlib
import dataclasses
import functools
import io
import json
import logging
import os
import pathlib
import struct
import subprocess
import sys
import time
import zlib
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging as absl_logging
from PIL import Image

from configs import digits
from regnet_flax import main
from regnet_flax.data.folder import Split
from regnet_flax.data.sources import SOURCES, Dataset
from regnet_flax.models import registry

ROOT = pathlib.Path(__file__).resolve().parent.parent

# One line of metrics.jsonl, with every field.
LINE = {
    "step": 1170,
    "epoch": 3.0,
    "train_loss": 1.23456,
    "train_accuracy": 0.5678,
    "learning_rate": 0.1,
    "images_per_second": 2345.6,
    "eval_loss": 1.5,
    "eval_accuracy": 0.4321,
    "eval_top5_accuracy": 0.9,
}


# Configs and data sets


def tiny_config(**overrides):
    config = digits.get_config("resnet8")
    config.model.overrides.width = 4
    config.train.batch_size = 32
    config.train.epochs = 3
    config.eval.batch_size = 25
    config.log.every_steps = 5
    config.update_from_flattened_dict(overrides)
    return config


def small_dataset(train=48, test=21, classes=10):
    rng = np.random.default_rng(0)

    def split(n):
        labels = (np.arange(n) % classes).astype(np.int32)
        return Split(rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8), labels)

    return Dataset("synthetic", split(train), split(test), tuple(map(str, range(classes))))


_digits = functools.cache(SOURCES["digits"])


@contextlib.contextmanager
def few_digits(train=132, test=60, **changes):
    """In this process, shrinks the data set "digits" to so many images, or replaces them; `changes`: other fields.

    Runs on the same images with the same config, except for where they end, are compiled once for all test files.
    """
    whole = _digits()
    if not isinstance(train, Split):
        train = Split(whole.train.images[:train], whole.train.labels[:train])
    test = Split(whole.test.images[:test], whole.test.labels[:test])
    few = dataclasses.replace(whole, train=train, test=test, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SOURCES, "digits", lambda **_: few)
        yield


@contextlib.contextmanager
def shallow(*names, stage_sizes=(1,)):
    """In this process, the models of these names have only so many blocks, for tests that no model matters to.

    To trace and compile a block takes longer than to train it.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            model = registry._resolve(name)
            fields = model.keywords | {"stage_sizes": stage_sizes}
            patch.setitem(registry.MODELS, name, functools.partial(model.func, **fields))
        yield


# Images


def photo(**options):
    """The contents of an image file of random pixels, wider than high; `options` of Pillow's save."""
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (21, 34, 3), np.uint8)
    Image.fromarray(noise).save(file, **{"format": "PNG"} | options)
    return file.getvalue()


def bomb(path, side):
    """Writes a PNG of side × side black pixels in a few kilobytes."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    pixels = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


# Workdirs


def checksums(workdir, step):
    """Returns the checksums of all arrays of a checkpoint, but not of its record, which has the wall time."""
    record = json.loads((workdir / "checkpoints" / str(step) / "record" / "metadata").read_text())
    return {name: value for name, value in record["checksums"].items() if name != "record"}


def metrics(workdir):
    """Returns the lines of metrics.jsonl without times."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


class Recorder:
    """A tracker, `log.trackers=("helpers:Recorder",)`: calls = [(what, the run's name, …), …]."""

    calls: ClassVar[list] = []

    def __init__(self, start):
        self.id, self.name = start.id or f"id{len(self.calls)}", start.name
        self.calls.append(("start", self.name, start))

    def config(self, values):
        self.calls.append(("config", self.name, values))

    def log(self, step, values):
        self.calls.append(("log", self.name, step, values))

    def finish(self, error):
        self.calls.append(("finish", self.name, error))


# The program


def run_program(*arguments, cwd=None, check=None, devices=1):
    """Runs the command line in this process, and restores the process afterwards.

    Args:
      *arguments: the command line's arguments.
      cwd: the current directory during the run.
      check: the expected exit code, if given.
      devices: how many of the test's CPU devices the program sees.

    Returns:
      The same as subprocess.run: returncode, stdout and stderr. Exceptions that the program does not catch propagate.
    """
    arguments = [str(argument) for argument in arguments]
    logger, out, err = logging.getLogger("regnet_flax"), io.StringIO(), io.StringIO()
    level, verbosity, path = logger.level, absl_logging.get_verbosity(), list(sys.path)
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setattr(logger, "handlers", [])
        patch.setattr(logger, "propagate", True)
        patch.setattr(jax, "devices", lambda *_: jax.local_devices()[:devices])
        patch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # the program adds to it
        stack.callback(logger.setLevel, level)
        stack.callback(absl_logging.set_verbosity, verbosity)
        stack.callback(sys.path.__setitem__, slice(None), path)
        stack.enter_context(contextlib.chdir(cwd or os.getcwd()))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        code = main.main(arguments)
    done = subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
    assert check is None or code == check, done.stdout + done.stderr
    return done


def environment(**more):
    """Returns the environment of a separate process that uses this copy of the package."""
    return os.environ | {"PYTHONPATH": str(ROOT)} | more


def run_process(*arguments, cwd=None, env=None, before=(), check=None, timeout=600):
    """Runs the command line in a separate process, after the words `before`; returns it with its output."""
    command = [*before, sys.executable, "-m", "regnet_flax.main", *map(str, arguments)]
    env = environment(**(env or {}))
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
    assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    assert check is None or done.returncode == check, done.stdout + done.stderr
    return done


def error_of(done, code):
    """Returns the single error line of a program that ended with that code."""
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == code and line.startswith("error: "), done.stdout + done.stderr
    return line


# Models


def random_variables(model, images):
    """Draws random variables of a model; none has its initial value."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    random = np.random.default_rng(0)

    def values(path, a):
        drawn = 0.4 * random.standard_normal(a.shape, np.float32)
        return 0.5 + abs(drawn) if path[-1].key in ("var", "scale") else drawn

    return jax.tree_util.tree_map_with_path(values, shapes)


# Processes seen from outside


def children(parent, worker=True):
    """Returns a process's children: only workers spawned by multiprocessing, unless worker=False."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process just ended
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent and (not worker or b"spawn_main" in (path / "cmdline").read_bytes()):
                found.append(int(path.name))
    return found


def alive(pids):
    """Returns the processes that are still running."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(pid)
    return found


def wait_until(condition, seconds=60):
    """Waits for a condition; raises AssertionError if it does not become true."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


@contextlib.contextmanager
def failures():
    """Collects the failures of many cases and raises all at once: `with failures() as case: … with case(label):`."""
    found = []

    @contextlib.contextmanager
    def case(label):
        try:
            yield
        except (Exception, pytest.fail.Exception) as error:
            found.append(f"{label}: {type(error).__name__}: {error}")

    yield case
    assert not found, f"{len(found)} cases failed:\n" + "\n".join(found)


def halves(a):
    return jnp.asarray(a.reshape(2, -1, *a.shape[1:]))


def close(found, expected, rtol):
    """Checks that errors are within rtol of the largest element."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        scale = np.abs(b, where=np.isfinite(b), out=np.zeros_like(b)).max(initial=0)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * scale, err_msg=jax.tree_util.keystr(path))
