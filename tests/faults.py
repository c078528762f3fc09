"""Helpers for the tests of faults: run the program in a subprocess, follow its phases, check what it left."""

import contextlib
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import pytest

from configs import digits
from helpers import ROOT, environment, error_of, metrics  # noqa: F401
from helpers import run_process as run
from regnet_flax.modes.setup.models import build_model
from regnet_flax.modes.setup.trainers import build_step
from regnet_flax.training.checkpoint import Checkpoints
from regnet_flax.training.optimizer import build_optimizer

# 66 steps, a checkpoint every 4, and evaluations of 18 batches after every 11.
TINY = [
    "--config.model.name=resnet8",
    "--config.model.overrides.width=4",
    "--config.train.batch_size=128",
    "--config.train.epochs=6",
    "--config.eval.batch_size=20",
    "--config.log.every_steps=5",
    "--config.checkpoint.every_steps=4",
]
STEPS = 66
# Root ignores permissions; a program without these capabilities obeys them. (CAP_DAC_OVERRIDE, _READ_SEARCH)
_POWERLESS = """
import ctypes, os, sys
if os.geteuid() == 0:
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if any(prctl(24, power, 0, 0, 0) for power in (1, 2)):
        sys.exit("powers cannot be dropped")
os.execv(sys.argv[1], sys.argv[1:])
"""
_LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
os.execv(sys.argv[2], sys.argv[2:])
"""
POWERLESS = [sys.executable, "-c", _POWERLESS]


def limited(file_size):
    """Returns the prefix of a command that limits the size of its files, in bytes."""
    return [sys.executable, "-c", _LIMITED, str(file_size)]


class Started:
    """The running program, which announces its phases (see announced.py).

    Attributes:
      process: the program's process.
      phases: its current phases.
    """

    def __init__(self, *arguments, before=(), **options):
        self._reader, writer = os.pipe()
        os.set_blocking(self._reader, False)
        command = [*before, sys.executable, ROOT / "tests/announced.py", writer, *arguments]
        self._out = tempfile.TemporaryFile("w+")  # a full pipe that nobody reads would block the program
        options.setdefault("env", environment())
        self.process = subprocess.Popen(
            list(map(str, command)),
            pass_fds=[writer],
            stdout=self._out,
            stderr=subprocess.STDOUT,
            **options,
        )
        os.close(writer)
        self.phases, self._buffer = [], b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._out.close()
        os.close(self._reader)

    def read(self):
        """Returns the announcements since the last call."""
        with contextlib.suppress(BlockingIOError):
            while content := os.read(self._reader, 65536):
                self._buffer += content
        *lines, self._buffer = self._buffer.split(b"\n")
        found = [line.decode() for line in lines]
        for line in found:
            if line[0] == "+":
                self.phases.append(line[1:])
            elif line[0] == "-":
                self.phases.remove(line[1:])
        return found

    def until(self, announcement, times=1, timeout=300):
        """Waits for an announcement; returns whether it came before the program ended."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            ended = self.process.poll() is not None
            for line in self.read():
                times -= line == announcement
            if times <= 0:
                return True
            if ended:
                return False
            time.sleep(0.001)
        raise TimeoutError(announcement)

    def end(self, timeout=300):
        """Waits for the end; returns exit code and output."""
        self.process.wait(timeout)
        self.read()
        self._out.seek(0)
        out = self._out.read()
        assert "Traceback" not in out, out
        return self.process.returncode, out


def arrays(workdir, step=STEPS):
    """Returns every array of a checkpoint, including the optimiser's state, by its path."""
    config = digits.get_config("resnet8")
    config.model.overrides.width, config.dataset.num_classes = 4, 10
    model, tx = build_model(config), build_optimizer(config, 1)[1]
    shapes = jax.eval_shape(build_step(config, model, tx, (8, 8, 1), True).init, 0)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), shapes)
    checkpoints = Checkpoints(workdir)
    try:
        state = jax.device_get(checkpoints._read(step, like)[0])
    finally:
        checkpoints.close()
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def assert_ends_alike(workdir, uninterrupted, step=STEPS):
    """Checks that a run with faults ended bitwise like the one without."""
    found, expected = arrays(workdir, step), arrays(uninterrupted, step)
    assert found.keys() == expected.keys() and any("opt_state" in name for name in found)
    for name in expected:
        assert found[name].tobytes() == expected[name].tobytes(), name
    assert metrics(workdir) == metrics(uninterrupted)
    assert_tensorboard_agrees(workdir)
    assert (workdir / "results.json").exists() and (workdir / "figures/curves.png").stat().st_size > 1000
    assert not list((workdir / "checkpoints").glob("*tmp*"))


def assert_tensorboard_agrees(workdir):
    """Checks that TensorBoard shows exactly the contents of metrics.jsonl."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    expected = {}
    for line in lines:
        for name, value in line.items():
            group, _, rest = name.partition("_")
            tag = f"{group}/{rest}" if group in ("train", "eval") else f"train/{name}"
            if name != "step":
                expected[tag, line["step"]] = np.float32(value)
    assert events(workdir) == expected


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """A run without faults."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    run(*TINY, "--workdir", workdir, check=0)
    return workdir


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of a given size in KiB: small_disk(3000) → its directory."""
    mounted = []

    def mount(kibibytes):
        path = tmp_path / f"disk{len(mounted)}"
        path.mkdir()
        try:
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", path], check=True, capture_output=True
            )
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("a tmpfs cannot be mounted here: it needs root")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", "-l", path], check=True)


def fill(disk):
    """Writes until the disk is full; returns the file, which the test must remove."""
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return ballast


def chance(*names):
    """Returns a random generator that is the same in every run of a test."""
    return random.Random("/".join(map(str, names)))


def events(path):
    """Returns (tag, step) of everything TensorBoard shows: a session's start discards all steps from its own on."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    shown = {}
    for file in sorted(path.glob("events.out.tfevents.*")):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                shown = {key: value for key, value in shown.items() if key[1] < event.step}
            for value in event.summary.value:
                shown[value.tag, event.step] = value.simple_value
    return shown
