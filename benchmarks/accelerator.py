"""Runs the most useful measurements on a GPU, in order of value, within a time limit; the next call resumes.

    python benchmarks/accelerator.py --out DIR --minutes 29 --data-dir CIFAR10_FOLDER

In this order: the tests of the Pallas kernels (2 minutes); RegNet-20's training, with and without them, and ResNet-20's
against the fastest PyTorch (7 minutes); a training step of several seeds together against a loop over them (6 minutes);
the CIFAR-10 comparison of table III, 200 epochs, in the remaining time, less what the last part needs; a core of the
parity tests (2 minutes). These are limits; compiling takes most of them. If the kernels fail their tests, the
comparison does without them. Finished parts are stored in DIR, summed up in DIR/accelerator.json, and not repeated.
CIFAR-10 is read from class folders: TensorFlow, TFDS and Grain are not needed. Arguments --config.FIELD=VALUE go to the
comparison.
"""

import argparse
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
PATHS = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # packages may have been copied there
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(PATHS)}
PARITY = ["tests/test_block_parity.py::test_cell", "tests/test_parity.py::test_ten_sgd_steps"]
PARITY += ["tests/test_parity.py::test_network"]


class Budget:
    """The remaining time. A command that exceeds it gets SIGTERM, on which the program saves, and resumes later."""

    def __init__(self, minutes, reserve=30):
        self._end = time.monotonic() + 60 * minutes - reserve

    def left(self):
        return self._end - time.monotonic()

    def run(self, name, command, log, seconds):
        """Runs a command for at most `seconds`; returns its exit code, None if the time was too short."""
        seconds = min(seconds, self.left())
        if seconds < 20:
            return None
        print(f"{name}: {' '.join(map(str, command))}", flush=True)
        # One cache for all parts: to compile a training step takes half a minute.
        environment = ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": str(log.parent / "compiled")}
        with log.open("a") as file:
            process = subprocess.Popen(
                list(map(str, command)),
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            try:
                return process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=20)
                return None
            finally:  # with its children, which would disturb the next measurement
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--data-dir", default="", help="CIFAR-10 as train/<class>/ and test/<class>/")
    parser.add_argument("--torch-device", default="cuda", help="for the parity tests")
    parser.add_argument("--models", nargs="+", default=["regnet20_convlstm", "resnet20"])
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--modes", nargs="+", default=["graphs", "compiled"], help="for versus_torch.py")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--seeds", default="(0, 1, 2, 3, 4)", help="for the comparison")
    parser.add_argument("--seeds-of", default="synthetic", help="seeds.py's --only")
    parser.add_argument("--epochs", type=int, default=200)
    arguments, overrides = parser.parse_known_args()
    if wrong := [word for word in overrides if not word.startswith("--config.")]:
        parser.error(f"unknown arguments: {' '.join(wrong)}")
    out, budget, python = arguments.out.resolve(), Budget(arguments.minutes), sys.executable
    out.mkdir(parents=True, exist_ok=True)
    record = out / "accelerator.json"
    done = json.loads(record.read_text()) if record.exists() else {}

    def step(name, minutes, command, result):
        """Makes one measurement, unless it was done before; `result` is the file that it writes."""
        if done.get(name, {}).get("exit_code") == 0:
            return
        began = time.monotonic()
        code = budget.run(name, command, out / f"{name}.log", 60 * minutes)
        seconds = done.get(name, {}).get("seconds", 0) + time.monotonic() - began
        done[name] = {"exit_code": code, "seconds": round(seconds, 1), "command": list(map(str, command))}
        if result.exists():
            done[name]["result"] = str(result.relative_to(out))
        record.write_text(json.dumps(done, indent=1) + "\n")

    tests = [python, "-m", "pytest", "-q", "-o", "addopts="]
    kernels = [*tests, "--thorough", f"--junitxml={out / 'kernels.xml'}", "tests/test_ops_gpu.py"]
    step("kernels", 2, kernels, out / "kernels.xml")
    if done["kernels"]["exit_code"] != 0:
        print(f"the Pallas kernels failed their tests, or had no time: see {out / 'kernels.log'}", flush=True)
        overrides.append("--config.model.overrides.ops=plain")
    sizes = ["--batch", arguments.batch, "--size", arguments.size, "--threads", 0, "--seconds", 0.5]
    against, together = (out / f"{name}.json" for name in ("versus_torch", "seeds"))
    for dtype in arguments.dtypes:
        for model in arguments.models:
            minutes, ours = (5, ["ours", "ours, plain"]) if "regnet" in model else (2, ["ours"])
            command = [python, "benchmarks/versus_torch.py", "--models", model, "--dtypes", dtype, "--tasks", "train"]
            command += ["--modes", *arguments.modes, *sizes, "--minutes", 0.5 * minutes, "--out", against]
            command += ["--ours", *ours]
            step(f"versus_torch_{model}_{dtype}", minutes, command, against)
    short = ["--rounds", 5, "--calls", 1]  # of 50 steps each
    step("seeds", 6, [python, "benchmarks/seeds.py", "--only", arguments.seeds_of, *short, "--out", together], together)
    parity = done.get("parity", {}).get("exit_code") == 0
    if arguments.data_dir:
        compare = [python, "-m", "regnet_flax.main", "--mode", "compare", "--config", "configs/compare_cifar10.py"]
        compare += ["--config.dataset.name=folder", f"--config.dataset.data_dir={arguments.data_dir}"]
        compare += [
            f"--config.compare.seeds={arguments.seeds}",
            f"--config.train.epochs={arguments.epochs}",
            *overrides,
        ]
        compare += ["--workdir", out / "compare_cifar10"]
        minutes = budget.left() / 60 - (0 if parity else 2)
        step("compare", minutes, compare, out / "compare_cifar10" / "report.md")
    tests += ["--torch-device", arguments.torch_device]
    step("parity", 2, [*tests, "--parity-report", out / "parity.md", *PARITY], out / "parity.md")
    print(json.dumps({name: entry["exit_code"] for name, entry in done.items()}))


if __name__ == "__main__":
    main()
