"""Eight CPU devices, and one compilation cache for the whole run, including subprocesses.

JAX_COMPILATION_CACHE_DIR names a cache that outlives the run. Compiling takes most of the time, so it skips most
optimisations and uses XLA's quicker emitters, unless --slow, --parity-report or a GPU's --torch-device needs the
program as users have it.
"""

import contextlib
import gc
import importlib.metadata
import logging
import os
import pathlib
import resource
import shutil
import sys
import tempfile
import types

import jax
import pytest
from PIL import Image

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

# The files that take longest, so that no process is left alone with one of them at the end.
LONG = ("test_parity", "test_ops", "test_networks", "test_recipe", "test_outside", "test_checkpoint", "test_streamed")
# Of a worker that has compiled; see _release_compiled.
MEMORY = 5 << 29
_compiled = {}


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


def pytest_collection_finish():
    """Tracing makes many objects: garbage collections that look through all that is imported double its time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    for name in ("slow", "thorough"):
        if not config.getoption(f"--{name}"):
            for item in items:
                if name in item.keywords:
                    item.add_marker(pytest.mark.skip(reason=f"{name}: give --{name}"))


def pytest_unconfigure():
    if not _given_cache:
        shutil.rmtree(_cache, ignore_errors=True)


@pytest.fixture(autouse=True, scope="session")
def _share_compiled():
    """In one process, trainers of one config and model share traced and compiled functions.

    A run that resumes, evaluates or trains another seed would otherwise trace everything again, which takes the most
    time.
    """

    def make_trainer(config, dataset, devices, seeds=(), start=None):
        settings, data = config.to_dict(), config.dataset
        del settings["train"]["max_steps"]
        of_step = settings["train"], settings["optimizer"], data.augment, data.mean, data.std, data.num_classes
        of_step += dataset.size("train"), dataset.image_shape, devices
        # The model itself, since two tests may register a cell under one name.
        model = models.build_model(config, devices)
        step = "step", repr(of_step), model
        with pytest.MonkeyPatch.context() as patch:
            if step in _compiled:
                patch.setattr(trainers, "build_step", lambda *_, **__: _compiled[step][0])
            trainer = setup_trainer(config, dataset, devices, seeds, start)
        trainer._step = _compiled.setdefault(step, (trainer._step,))[0]
        # Of one model initial values depend on which parts the optimiser's state has, not on its settings.
        leaves, structure = jax.tree.flatten(trainer.like)
        init = "init", model, dataset.image_shape, structure, tuple((a.shape, a.dtype) for a in leaves)
        trainer._init = _compiled.setdefault(init, trainer._init)
        of_training = type(dataset), len(trainer.seeds) if trainer.together else 1, trainer.steps_per_call
        trainer._p_train = _compiled.setdefault((step, repr(of_training)), trainer._p_train)
        of_evaluation = data.mean, data.std, config.train.batch_norm, type(dataset), devices
        trainer._p_eval = _compiled.setdefault(("evaluation", repr(of_evaluation), model), trainer._p_eval)
        return trainer

    from regnet_flax.modes.setup import models, trainers

    setup_trainer = trainers.make_trainer
    with pytest.MonkeyPatch.context() as patch:
        for module in ("setup.trainers", "train", "evaluate"):
            patch.setattr(f"regnet_flax.modes.{module}.make_trainer", make_trainer)
        yield


@pytest.fixture(autouse=True, scope="module")
def _release_compiled():
    """Drops what is compiled after a module where it would fill the memory."""
    yield
    if _resident_bytes() > MEMORY:
        _compiled.clear()
        jax.clear_caches()


def _resident_bytes():
    """Of this process; what it had at most where the system has no /proc."""
    with contextlib.suppress(OSError):
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@pytest.fixture(autouse=True, scope="session")
def pictures():
    """What runs and reports in this process write as pictures is blank: to draw them takes a second for each run.

    `with pictures(): …` draws them.
    """
    from regnet_flax.analysis import by_class, report
    from regnet_flax.modes import evaluate, train

    def blank(*arguments, **_):
        Image.new("L", (1, 1)).save(next(path for path in arguments if isinstance(path, pathlib.Path)))

    names = ("curves", "predictions", "confusion", "compared_curves", "compared_costs")
    plots = types.SimpleNamespace(**dict.fromkeys(names, blank))

    def write_figures(*arguments, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(by_class, "classes", plots)
            return by_class.write_figures(*arguments, **options)

    replaced = [(train, "training", plots), (report, "comparison", plots)]
    replaced += [(mode, "write_figures", write_figures) for mode in (train, evaluate)]
    drawn = [(module, name, getattr(module, name)) for module, name, _ in replaced]

    @contextlib.contextmanager
    def replace(values):
        with pytest.MonkeyPatch.context() as patch:
            for value in values:
                patch.setattr(*value)
            yield

    with replace(replaced):
        yield lambda: replace(drawn)


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
