"""Everything that is worth measuring on a GPU, in one call, within a time, going on where it was stopped.

    python benchmarks/accelerator.py --out DIR --minutes 9 --data-dir CIFAR10_FOLDER

In this order: the parity tests on the accelerator; training and inference against PyTorch; a training step of several
seeds together against one seed's; then the CIFAR-10 comparison, 200 epochs, as many of its models as fit. What has been
done stands in DIR, is not done again, and is summed up in DIR/accelerator.json. CIFAR-10 is read from class folders.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
MODELS = ["resnet20", "regnet20_convlstm"]
PARITY = ["tests/test_parity.py", "tests/test_block_parity.py", "tests/test_optimizer.py", "tests/test_ops_gpu.py"]
VARIANTS = ["torch eager, channels first", "torch eager, channels last"]
VARIANTS += ["torch.compile, channels first", "torch.compile, channels last", "ours"]


class Budget:
    """The time that is left; the program's SIGTERM saves, so what does not fit is stopped and gone on with later."""

    def __init__(self, minutes, reserve=30):
        self._end = time.monotonic() + 60 * minutes - reserve

    def left(self):
        return self._end - time.monotonic()

    def run(self, name, command, log):
        """Runs a command while there is time; returns its exit code, None if it was stopped."""
        if self.left() < 20:
            return None
        print(f"{name}: {' '.join(map(str, command))}", flush=True)
        with log.open("a") as file:
            process = subprocess.Popen(
                list(map(str, command)), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=ENVIRONMENT
            )
            try:
                return process.wait(timeout=self.left())
            except subprocess.TimeoutExpired:
                process.terminate()
                try:
                    process.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    process.kill()
                return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--data-dir", default="", help="CIFAR-10 as train/<class>/ and test/<class>/")
    parser.add_argument("--torch-device", default="cuda")
    parser.add_argument("--seeds", default="(0, 1, 2, 3, 4)")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--batch", type=int, default=128)
    arguments = parser.parse_args()
    out, budget = arguments.out.resolve(), Budget(arguments.minutes)
    out.mkdir(parents=True, exist_ok=True)
    record = out / "accelerator.json"
    done = json.loads(record.read_text()) if record.exists() else {}
    python = sys.executable

    def step(name, command, result=None):
        """One measurement, unless it was done before; `result` is the file that it leaves."""
        if done.get(name, {}).get("exit_code") == 0:
            return
        began = time.monotonic()
        code = budget.run(name, command, out / f"{name}.log")
        done[name] = {
            "exit_code": code,
            "seconds": round(time.monotonic() - began, 1),
            "command": list(map(str, command)),
        }
        if result is not None and result.exists():
            done[name]["result"] = str(result.relative_to(out))
        record.write_text(json.dumps(done, indent=1) + "\n")

    report = out / "parity.md"
    step(
        "parity",
        [
            python,
            "-m",
            "pytest",
            "-q",
            "-o",
            "addopts=",
            "--torch-device",
            arguments.torch_device,
            "--thorough",
            "--parity-report",
            report,
            *PARITY,
        ],
    )
    for dtype in ("float32", "bfloat16"):
        for model in MODELS:
            result = out / f"versus_torch_{model}_{dtype}.json"
            command = [
                python,
                "benchmarks/versus_torch.py",
                "--models",
                model,
                "--dtypes",
                dtype,
                "--variants",
                *VARIANTS,
            ]
            command += ["ours, gpu"] if "lstm" in model else []
            step(f"versus_torch_{model}_{dtype}", [*command, "--batch", arguments.batch, "--out", result], result)
    result = out / "seeds.json"
    step("seeds", [python, "benchmarks/seeds.py", "--out", result], result)
    if arguments.data_dir:
        compare = [python, "-m", "regnet_flax.main", "--mode", "compare", "--config", "configs/compare_cifar10.py"]
        compare += ["--config.dataset.name=folder", f"--config.dataset.data_dir={arguments.data_dir}"]
        compare += [f"--config.compare.seeds={arguments.seeds}", f"--config.train.epochs={arguments.epochs}"]
        step("compare", [*compare, "--workdir", out / "compare_cifar10"], out / "compare_cifar10" / "report.md")
    print(json.dumps({name: entry["exit_code"] for name, entry in done.items()}))


if __name__ == "__main__":
    main()
