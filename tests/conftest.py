"""Eight CPU devices, and one compilation cache for the whole run, including subprocesses.

JAX_COMPILATION_CACHE_DIR names a cache that outlives the run. Compiling takes most of the time, so it skips most
optimisations and uses XLA's quicker emitters, unless --slow, --parity-report or a GPU's --torch-device needs the
program as users have it.
"""

import contextlib
import importlib.metadata
import logging
import os
import pathlib
import shutil
import sys
import tempfile

import jax
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # for `configs`

# Importing it imports jax, but starts no back end.
import helpers

pytest_plugins = ["faults_report", "streams"]

_given_cache = os.environ.get("JAX_COMPILATION_CACHE_DIR")
_cache = _given_cache or tempfile.mkdtemp(prefix="regnet_flax_tests_")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
jax.config.update("jax_compilation_cache_dir", _cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_num_cpu_devices", 8)

# They take less than half the time of the default emitters, for the same HLO. An unknown flag ends the process, so only
# tested versions of jaxlib are named.
QUICK = {"0.10.2": "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"}


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also the tests marked slow")
    parser.addoption("--thorough", action="store_true", help="also the tests marked thorough")
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
    for name in ("slow", "thorough"):
        if not config.getoption(f"--{name}"):
            for item in items:
                if name in item.keywords:
                    item.add_marker(pytest.mark.skip(reason=f"{name}: give --{name}"))


def pytest_unconfigure():
    if not _given_cache:
        shutil.rmtree(_cache, ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def _share_compiled():
    """In a module, trainers of one config share traced and compiled functions; hundreds would fill the memory.

    A run that resumes, evaluates or trains another seed would otherwise trace everything again, which takes the most
    time.
    """
    trainers = {}

    def make_trainer(config, dataset, devices, seeds=(), start=None):
        trainer = setup_trainer(config, dataset, devices, seeds, start)
        compiled = config.to_dict()
        for name in ("seed", "compare", "checkpoint", "log", "eval"):
            del compiled[name]
        del compiled["train"]["max_steps"]
        of_data = dataset.name, dataset.size("train"), dataset.image_shape, type(dataset)
        of_trainer = devices, len(trainer.seeds), trainer.together, trainer.steps_per_call
        first = trainers.setdefault(repr((compiled, of_data, of_trainer)), trainer)
        for name in ("_init", "_p_train", "_p_eval"):
            setattr(trainer, name, getattr(first, name))
        return trainer

    from regnet_flax.modes import setup

    setup_trainer = setup.make_trainer
    with pytest.MonkeyPatch.context() as patch:
        for module in ("setup", "train", "evaluate"):
            patch.setattr(f"regnet_flax.modes.{module}.make_trainer", make_trainer)
        yield
    trainers.clear()
    jax.clear_caches()


@pytest.fixture
def parity(request):
    """`with parity(dtype) as device`: both frameworks compute in dtype, even on a GPU, and PyTorch on `device`."""
    import torch

    @contextlib.contextmanager
    def exact(dtype):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        with jax.default_matmul_precision("highest"), jax.enable_x64(dtype == "float64"):
            yield torch.device(request.config.getoption("--torch-device"))

    return exact


@pytest.fixture
def program():
    """Runs the program in a separate process: program("--mode", "eval", cwd=…) → a finished process with its output.

    Use it for tests of starting, stopping and imports; otherwise use helpers.run_program.
    """
    return helpers.run_process


@pytest.fixture
def logger(monkeypatch):
    """The package's logger, before anything is set up."""
    logger = logging.getLogger("regnet_flax")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    level = logger.level
    logger.setLevel(logging.NOTSET)
    yield logger
    logger.setLevel(level)


@pytest.fixture
def figures(monkeypatch):
    """Collects the figures instead of closing them."""
    from matplotlib import pyplot as plt

    drawn = []
    with monkeypatch.context() as patched:
        patched.setattr(plt, "close", drawn.append)
        yield drawn
    plt.close("all")
