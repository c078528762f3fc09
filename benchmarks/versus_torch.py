"""Training steps and inference against PyTorch, on this machine: images a second, and the ratio to PyTorch's best.

    python benchmarks/versus_torch.py --out versus_torch.json

Every variant has a process of its own, and they take turns: in each round each of them takes some steps, while the
others wait. Medians over the rounds; a ratio is taken within each round. Ours is the package's training step; theirs
the PyTorch reference of the tests, in eager mode and under torch.compile, in both memory layouts. A training step is
forward and backward pass, batch statistics and SGD with momentum and weight decay, on a batch that lies on the device.
"""

import argparse
import functools
import json
import os
import pathlib
import shlex
import subprocess
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
VARIANTS = {
    "ours": {},
    "ours, plain": {"ops": "plain"},
    "ours, gpu": {"ops": "gpu"},
    "torch eager, channels first": {},
    "torch eager, channels last": {"channels_last": True},
    "torch.compile, channels first": {"compile": True},
    "torch.compile, channels last": {"channels_last": True, "compile": True},
}
ON_CPU = [name for name in VARIANTS if name != "ours, gpu"]  # interpreted there
CLASSES = 10


def our_calls(model, batch, size, dtype, **options):
    """Functions that start a training step and an inference, each returning what to wait for; and how to wait."""
    import jax
    import jax.numpy as jnp

    from regnet_flax import create_model, xla_flags
    from regnet_flax.training import optimizer
    from regnet_flax.training import step as steps

    xla_flags.set_defaults()  # as regnet_flax.main does
    network = create_model(model, num_classes=CLASSES, dtype=jnp.dtype(dtype), **options)
    images = jax.random.normal(jax.random.key(1), (batch, size, size, 3))
    data = {"images": images, "labels": jnp.arange(batch, dtype=jnp.int32) % CLASSES}
    variables = jax.jit(functools.partial(network.init, train=False))(jax.random.key(0), images[:1])
    tx = optimizer.make_optimizer("sgd", lambda count: jnp.float32(0.1), weight_decay=1e-4)
    state = steps.create_train_state(variables, tx)
    step = jax.jit(functools.partial(steps.train_step, apply_fn=network.apply, tx=tx), donate_argnums=0)
    infer = jax.jit(functools.partial(network.apply, train=False))
    fixed = jax.tree.map(jnp.copy, variables)
    began = time.perf_counter()
    compiled = step.lower(state, data).compile()
    facts = {
        "compile_s": round(time.perf_counter() - began, 2),
        "temporaries_mb": round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 1),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }

    def train():
        nonlocal state
        state, _ = compiled(state, data)
        return state.step

    calls = {"train": train, "infer": lambda: infer(fixed, images), "program": compiled.as_text}
    return calls, jax.block_until_ready, facts


def their_calls(model, batch, size, dtype, channels_last=False, compile=False):
    """As our_calls."""
    sys.path.insert(0, str(ROOT / "tests"))
    import torch

    import torch_reference

    device = "cuda" if torch.cuda.is_available() else "cpu"
    layout = torch.channels_last if channels_last else torch.contiguous_format
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # TF32, as XLA takes by default on a GPU that has it
    torch.backends.cudnn.allow_tf32 = True
    network = torch_reference.build(model, CLASSES).to(device).to(memory_format=layout)
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=layout)
    labels = torch.arange(batch, device=device) % CLASSES
    sgd = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    forward = torch.compile(network) if compile else network
    cast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")

    def train():
        network.train()
        sgd.zero_grad(set_to_none=True)
        with cast:
            loss = torch.nn.functional.cross_entropy(forward(images), labels)
        loss.backward()
        sgd.step()

    def infer():
        network.eval()
        with torch.no_grad(), cast:
            forward(images)

    began = time.perf_counter()
    train()
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    facts = {"first_step_s": round(time.perf_counter() - began, 2), "device": name, "torch": torch.__version__}
    return {"train": train, "infer": infer}, lambda _: torch.cuda.synchronize() if device == "cuda" else None, facts


def work(name, *settings):
    """A variant's process: for each line "train 3" on stdin, seconds a step over three steps on stdout."""
    sys.path.insert(0, str(ROOT))
    ours = name.startswith("ours")
    calls, wait, facts = (our_calls if ours else their_calls)(*settings, **VARIANTS[name])
    if ours:  # here, since JAX would take a GPU in the process that waits for all of them
        import jax

        from regnet_flax.environment import environment

        facts["environment"] = environment(jax.local_devices()[:1])
    for what in ("train", "infer"):  # what is compiled or chosen at the first calls
        for _ in range(3):
            wait(calls[what]())
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        what, count = line.split()
        began = time.perf_counter()
        for _ in range(int(count)):
            last = calls[what]()
        wait(last)
        print((time.perf_counter() - began) / int(count), flush=True)


class WorkerError(RuntimeError):
    """A variant's process ended; what it said is above."""


class Worker:
    """A variant's process, seen from outside."""

    def __init__(self, name, *settings):
        command = [sys.executable, __file__, "--worker", json.dumps([name, *settings])]
        # All of them are there at once, and JAX would take most of a GPU's memory for the first.
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._name, self.facts = name, json.loads(self._answer())

    def _answer(self):
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"{self._name}: its process ended with {self._process.wait()}")
        return line

    def time(self, what, count):
        """Seconds a step over `count` steps."""
        self._process.stdin.write(f"{what} {count}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self):
        self._process.stdin.close()
        self._process.wait()


def measure(model, batch, size, dtype, rounds, seconds, names):
    """Images a second of each variant, and each one's ratio to the best of PyTorch's."""
    workers = {}
    for name in names:
        try:
            workers[name] = Worker(name, model, batch, size, dtype)
        except WorkerError as error:
            print(f"left out: {error}", flush=True)
    found = {name: {"facts": worker.facts} for name, worker in workers.items()}
    for what in ("train", "infer"):
        counts = {name: max(1, round(seconds / worker.time(what, 2))) for name, worker in workers.items()}
        times = {name: [] for name in workers}
        for number in range(rounds):
            order = list(workers) if number % 2 else list(workers)[::-1]
            for name in order:
                times[name].append(workers[name].time(what, counts[name]))
        for name in workers:
            found[name][what] = {
                "images_per_second": round(batch / float(np.median(times[name])), 1),
                "seconds_a_step": [round(t, 6) for t in times[name]],
            }
        theirs = [name for name in workers if name.startswith("torch")]
        if not theirs:
            continue
        best = min(theirs, key=lambda name: np.median(times[name]))
        for name in workers:
            ratios = np.array(times[best]) / np.array(times[name])
            found[name][what]["ratio"] = round(float(np.median(ratios)), 3)
            found[name][what]["ratio_range"] = [round(float(ratios.min()), 3), round(float(ratios.max()), 3)]
    for worker in workers.values():
        worker.close()
    return found


def table(results):
    """A Markdown table of the results."""
    lines = ["| model | type | variant | training, images/s | ratio | inference, images/s | ratio |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for result in results:
        for name, found in result["variants"].items():
            cells = [result["model"], result["dtype"], name]
            for what in ("train", "infer"):
                cells.append(f"{found[what]['images_per_second']:,.0f}")
                if "ratio" not in found[what]:  # nothing of PyTorch's took part
                    cells.append("–")
                    continue
                low, high = found[what]["ratio_range"]
                cells.append(f"{found[what]['ratio']:.2f} ({low:.2f} to {high:.2f})")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet20", "regnet20_convlstm"])
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--variants", nargs="+", default=ON_CPU, choices=["all", *VARIANTS])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one variant in one round")
    parser.add_argument("--out", default="")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(*json.loads(arguments.worker))
        return
    results, variants = [], list(VARIANTS) if "all" in arguments.variants else arguments.variants
    for model in arguments.models:
        for dtype in arguments.dtypes:
            settings = model, arguments.batch, arguments.size, dtype
            found = measure(*settings, arguments.rounds, arguments.seconds, variants)
            where = {}
            for variant in found.values():
                where = variant["facts"].pop("environment", where)
            where.pop("command", None)  # of that process; the whole file has the one that was given
            result = dict(zip(("model", "batch", "size", "dtype"), settings, strict=True))
            results.append(result | where | {"variants": found})
            print(table(results[-1:]), flush=True)
            if arguments.out:
                command = shlex.join(["python", "benchmarks/versus_torch.py", *sys.argv[1:]])
                pathlib.Path(arguments.out).write_text(
                    json.dumps({"command": command, "results": results}, indent=1) + "\n"
                )


if __name__ == "__main__":
    main()
