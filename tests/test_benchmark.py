"""--mode benchmark, and the comparison of speed with PyTorch."""

import importlib
import json
import subprocess
import sys

import jax
import pytest

from helpers import ROOT, error_of, run_program, shallow
from regnet_flax import start
from regnet_flax.models.ops import native_library
from regnet_flax.modes import benchmark

TINY = ["--config.model.name=resnet8", "--config.model.overrides.width=4", "--config.train.batch_size=8"]


def test_the_last_line_is_one_object_with_figures_that_fit_together(monkeypatch):
    monkeypatch.setattr(benchmark, "SECONDS", 0.2)
    monkeypatch.setitem(benchmark.MATRIX, "cpu", 256)
    done = run_program("--mode", "benchmark", *TINY, check=0)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["images_per_second"] == pytest.approx(8 / (found["step_ms"] / 1000), rel=0.01)
    assert found["compile_s"] > 0 and found["peak_bytes"] > 1000
    # 8×8×1 digits: 9·4 taps for the stem's 64 pixels, and so on; counted by hand for every layer.
    stem, stage1 = 64 * 9 * 4, 64 * 2 * 9 * 4 * 4
    stage2 = 16 * (9 * 4 * 8 + 9 * 8 * 8 + 4 * 8)
    stage3 = 4 * (9 * 8 * 16 + 9 * 16 * 16 + 8 * 16)
    flops = 6 * (stem + stage1 + stage2 + stage3 + 16 * 10)
    assert found["flops_per_second"] == pytest.approx(flops * found["images_per_second"], rel=0.01)
    share = found["flops_per_second"] / found["matmul_flops_per_second"] / found["devices"]
    assert found["share_of_matmul"] == pytest.approx(share, abs=1e-4)


def test_a_wrong_config_is_told_in_one_line():
    done = run_program("--mode", "benchmark", "--config.train.batch_size=0", check=2)
    assert "train.batch_size is 0" in error_of(done, 2)


def test_the_matrix_product_is_what_is_timed(monkeypatch):
    monkeypatch.setitem(benchmark.MATRIX, "cpu", 64)
    clock = iter([0.0, 3.0, 10.0, 12.0])
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    assert benchmark.matmul_rate(jax.devices()[0], "float32", rounds=2) == 2 * 64**3 / 2


def test_photographs_are_random_images_of_their_size(monkeypatch):
    """No data set is read, and the crop while decoding is skipped."""
    from configs import imagenet

    config = imagenet.get_config("resnet8")
    config.dataset.image_size, config.dataset.num_classes, config.train.batch_size = 32, 5, 4
    config.model.overrides.width = 4
    monkeypatch.setattr(benchmark, "SECONDS", 0.0)
    monkeypatch.setitem(benchmark.MATRIX, "cpu", 64)
    with shallow("resnet8"):
        found = benchmark.benchmark(config, jax.devices()[:1])
    assert found["image_shape"] == [32, 32, 3] and found["images_per_second"] > 0
    assert config.dataset.augment[0] == "random_resized_crop", "the caller's config is left as it is"


@pytest.fixture
def versus_torch(monkeypatch):
    """benchmarks/versus_torch.py as a module."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("versus_torch")


def test_versus_torch_keeps_the_two_fastest_for_the_rounds(versus_torch, tmp_path, monkeypatch):
    """A stored first pass resumes, and a failing variant is left out."""
    out, started = tmp_path / "out.json", []
    rates = {"ours": 300, "torch folded, eager, channels last": 100, "torch all gates, eager, channels last": 200}
    rates["torch all gates, compiled, channels last"] = 400

    class Worker:
        def __init__(self, name, command, environment):
            started.append((name, environment.get("GLIBC_TUNABLES", "")))
            self.name, self.facts = name, {}

        def ready(self):
            if self.name not in rates:
                raise versus_torch.turns.WorkerError(self.name)
            return self

        def seconds(self, task, count):
            return 8 / rates[self.name]

        def close(self):
            pass

    def run(*arguments):
        started.clear()
        given = ["--models", "regnet20_convgru", "--tasks", "infer", "--batch", "8", "--out", str(out), *arguments]
        monkeypatch.setattr(sys, "argv", ["versus_torch.py", *given])
        versus_torch.main()
        return json.loads(out.read_text())["results"]

    monkeypatch.setattr(versus_torch.turns, "Worker", Worker)
    run("--first-pass", "--minutes", "0")
    assert started == [("torch per gate, eager, channels last", "")], "one, whatever the time"
    (result,) = run()
    best = ["torch all gates, compiled, channels last", "torch all gates, eager, channels last"]
    eager = [f"torch {form}, eager, channels {side}" for form in versus_torch.FORMS for side in ("last", "first")]
    compiled = ["torch folded, compiled, channels last", best[0]]
    assert [name for name, _ in started] == [*eager[1:], *compiled, "ours", *best]
    assert result["first_pass"]["infer"]["torch folded, compiled, channels last"] is None
    assert result["infer"]["ours"]["ratio"] == 0.75 and result["infer"][best[0]]["ratio_range"] == [1.0, 1.0]
    run("--peers", "torch folded, eager, channels last")
    assert [name for name, _ in started] == ["ours", "torch folded, eager, channels last"]
    assert len(run("--huge-pages")) == 2 and started[-1] == (best[1], start.TUNABLES)
    run("--threads", "0", "--modes", "graphs")
    graphs = [f"torch {form}, graphs, channels {side}" for form in versus_torch.FORMS for side in ("last", "first")]
    assert [name for name, _ in started[:12]] == [*graphs, *graphs], "all compile at once, then each has its turn"


def test_the_breakdown_names_every_native_operation(versus_torch):
    breakdown = importlib.import_module("breakdown")
    assert {f"regnet_flax_{name}" for name in breakdown.NATIVE} == set(native_library.TARGETS)


@pytest.mark.thorough
@pytest.mark.skipif(not native_library.available(), reason="there is no C++ compiler here")
def test_the_breakdown_finds_the_parts_of_a_step(versus_torch):
    found = importlib.import_module("breakdown").breakdown("regnet8_convgru", "train", 4, 8, "float32")
    parts = found["parts_ms"]
    assert {"regulator, forward", "regulator, backward", "convolutions, forward", "loss and SGD"} <= parts.keys()
    assert parts["convolutions, forward"] > 0 and parts["regulator, backward"] > 0
    assert parts.get("the rest", 0) < 0.2 * found["step_ms"]


def test_the_accelerators_measurements_resume(versus_torch, tmp_path, monkeypatch):
    """The most useful come first; finished ones are not repeated; versus_torch.py accepts its arguments."""
    accelerator, codes, names = importlib.import_module("accelerator"), {"seeds": None, "compare": None}, []
    parsed = []

    def run(self, name, command, log, seconds):
        names.append(name)
        if "versus_torch.py" in str(command[1]):
            parsed.append(name)
            monkeypatch.setattr(sys, "argv", list(map(str, command[1:])))
            assert ("ours, plain" in versus_torch.parse().ours) == ("regnet" in name)
        return codes.get(name, 0)

    def call(out=tmp_path):
        names.clear()
        monkeypatch.setattr(sys, "argv", ["accelerator.py", "--out", str(out), "--data-dir", "D", "--config.seed=1"])
        accelerator.main()
        return names

    def command(out=tmp_path):
        return json.loads((out / "accelerator.json").read_text())["compare"]["command"]

    monkeypatch.setattr(accelerator.Budget, "run", run)
    speed = ["versus_torch_regnet20_convlstm_float32", "versus_torch_resnet20_float32"]
    assert call() == ["kernels", *speed, "seeds", "compare", "parity"]
    assert "--config.seed=1" in command() and "--config.model.overrides.ops=plain" not in command()
    assert call() == ["seeds", "compare"] and parsed == speed
    codes["kernels"] = 1
    assert call(tmp_path / "other")[0] == "kernels"
    assert "--config.model.overrides.ops=plain" in command(tmp_path / "other")


@pytest.mark.slow
def test_versus_torch_takes_turns(tmp_path):
    out = tmp_path / "out.json"
    sizes = ["--models", "resnet8", "--batch", "4", "--size", "8", "--rounds", "3", "--seconds", "0.01"]
    subprocess.run(
        [sys.executable, "benchmarks/versus_torch.py", *sizes, "--modes", "eager", "--threads", "1", "--out", out],
        cwd=ROOT,
        check=True,
        timeout=300,
    )
    (result,) = json.loads(out.read_text())["results"]
    assert result["hardware"]["cpu_cores"] == 1 and result["versions"]["jax"]
    for task in ("train", "infer"):
        assert max(found["ratio"] for name, found in result[task].items() if name != "ours") == 1.0
        assert all(len(found["seconds_a_step"]) == 3 for found in result[task].values())
