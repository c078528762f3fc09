"""Eight CPU devices, and one compilation cache for the whole run, subprocesses included.

JAX_COMPILATION_CACHE_DIR names a cache that outlives the run. Compiling takes most of the time, so it is done without
most optimisations and by XLA's quicker emitters, unless --slow, --parity-report or a GPU's --torch-device asks for the
program as its users have it.
"""

import contextlib
import importlib.metadata
import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import jax
import pytest

pytest_plugins = ["faults_report"]

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for `configs`

_given_cache = os.environ.get("JAX_COMPILATION_CACHE_DIR")
_cache = _given_cache or tempfile.mkdtemp(prefix="regnet_flax_tests_")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
jax.config.update("jax_compilation_cache_dir", _cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_num_cpu_devices", 8)

# Less than half the time of the default emitters, for the same HLO. A flag that a version of jaxlib does not know ends
# the process, so only versions that were tried are named.
QUICK = {"0.10.2": "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"}

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


def checksums(workdir, step):
    """Of every array of a checkpoint; but not of its record, which has the wall time."""
    record = json.loads((workdir / "checkpoints" / str(step) / "record" / "metadata").read_text())
    return {name: value for name, value in record["checksums"].items() if name != "record"}


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also the tests marked slow")
    parser.addoption("--torch-device", default="cpu", help="where the PyTorch reference runs: cpu or cuda")
    parser.addoption("--parity-report", metavar="FILE", help="write a table of the errors against PyTorch into FILE")


def pytest_configure(config):
    device = config.getoption("--torch-device")
    if device == "cpu" and not (config.getoption("--slow") or config.getoption("--parity-report")):
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        jax.config.update("jax_disable_most_optimizations", True)
        flags = os.environ.get("XLA_FLAGS", ""), QUICK.get(importlib.metadata.version("jaxlib"), "")
        if "xla_cpu_use_fusion_emitters" not in flags[0]:
            os.environ["XLA_FLAGS"] = " ".join(flags).strip()
    if device != "cpu":
        import torch

        if not device.startswith("cuda") or not torch.cuda.is_available():
            raise pytest.UsageError(f"--torch-device {device}: PyTorch has no such device here")


def pytest_sessionfinish(session):
    if file := session.config.getoption("--parity-report"):
        import comparison

        comparison.write_report(pathlib.Path(file))


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: give --slow"))


def pytest_unconfigure():
    if not _given_cache:
        shutil.rmtree(_cache, ignore_errors=True)


@pytest.fixture(autouse=True)
def _release_compiled():
    """Hundreds of compiled functions would fill the memory otherwise."""
    yield
    jax.clear_caches()


@pytest.fixture
def parity(request):
    """`with parity(dtype) as device`: both frameworks compute in dtype, on a GPU too, and PyTorch on `device`."""
    import torch

    @contextlib.contextmanager
    def exact(dtype):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        with jax.default_matmul_precision("highest"), jax.enable_x64(dtype == "float64"):
            yield torch.device(request.config.getoption("--torch-device"))

    return exact


@pytest.fixture
def program():
    """Runs the program in a subprocess: program("--mode", "eval", cwd=…) → a finished process with its output."""

    def run(*arguments, cwd=None, env=None, check=None, timeout=300):
        done = subprocess.run(
            [sys.executable, "-m", "regnet_flax.main", *map(str, arguments)],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | (env or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check is not None:
            assert done.returncode == check, done.stdout + done.stderr
        return done

    return run


@pytest.fixture
def logger(monkeypatch):
    """The package's logger, as it is before anything is set up."""
    logger = logging.getLogger("regnet_flax")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    level = logger.level
    logger.setLevel(logging.NOTSET)
    yield logger
    logger.setLevel(level)
