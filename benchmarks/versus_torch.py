"""Training steps and inference against the fastest PyTorch on this machine: images per second, and their ratio.

    python benchmarks/versus_torch.py --models resnet20 --out versus_torch.json

First pass: each way to run the network in PyTorch gets one turn, and the two fastest stay. torch_peer.py has several
forms of the regulator; each runs eagerly, channels first and channels last, and the two fastest of these are also
compiled. Rounds: the two that stay and ours, each in its own process with the same number of threads, take turns in
alternating order. The figures are medians over the rounds. A ratio is computed within each round, to the PyTorch
variant with the best median. A training step is forward pass, loss, backward pass, batch statistics and SGD with
momentum and weight decay, on a batch on the device, without compilation and warm-up.

A file given with --out keeps the results of other models and settings. The first pass is stored there as it proceeds:
the same command resumes it without repeating anything.
"""

import argparse
import contextlib
import functools
import json
import pathlib
import shlex
import statistics
import subprocess
import sys
import time

import turns

ROOT = pathlib.Path(__file__).resolve().parent.parent
CLASSES = 10
OURS = {"ours": {}, "ours, plain": {"ops": "plain"}}
FORMS = ("per gate", "folded", "all gates")  # from torch_peer.FORMS, with the likely best one first
MODES = ("compiled", "eager")
TASKS = {"train": "training", "infer": "inference"}


def peers(model, modes):
    """Returns PyTorch's variants for a model: maps names to options of torch_peer.calls."""
    found = {}
    for mode in modes:
        for form in FORMS if model.startswith("regnet") else (None,):
            for layout in ("channels last", "channels first"):
                options = {"mode": mode, "channels_last": layout == "channels last"}
                words = [form, mode, layout] if form else [mode, layout]
                found["torch " + ", ".join(words)] = options | ({"form": form} if form else {})
    return found


def our_calls(model, batch, size, dtype, tasks=("train",), **options):
    """Returns functions by task that each start one step and return an object to wait for; a wait; and facts."""
    import jax
    import jax.numpy as jnp

    from regnet_flax import create_model, xla_flags
    from regnet_flax.environment import environment
    from regnet_flax.training import optimizer
    from regnet_flax.training import step as steps

    xla_flags.set_defaults()  # as regnet_flax.main does
    network = create_model(model, num_classes=CLASSES, dtype=jnp.dtype(dtype), **options)
    images = jax.random.normal(jax.random.key(1), (batch, size, size, 3))
    data = {"images": images, "labels": jnp.arange(batch, dtype=jnp.int32) % CLASSES}
    variables = jax.jit(functools.partial(network.init, train=False))(jax.random.key(0), images[:1])
    facts = {"device": jax.devices()[0].device_kind, "environment": environment(jax.local_devices()[:1])}
    calls = {}
    if "infer" in tasks:
        fixed = jax.tree.map(jnp.copy, variables)
        infer = jax.jit(functools.partial(network.apply, train=False)).lower(fixed, images).compile()
        facts["program"] = infer.as_text()
        calls["infer"] = lambda: infer(fixed, images)
    if "train" in tasks:
        tx = optimizer.make_optimizer("sgd", lambda count: jnp.float32(0.1), weight_decay=1e-4)
        state = steps.create_train_state(variables, tx)
        step = jax.jit(functools.partial(steps.train_step, apply_fn=network.apply, tx=tx), donate_argnums=0)
        began = time.perf_counter()
        compiled = step.lower(state, data).compile()
        facts["compile_s"] = round(time.perf_counter() - began, 2)
        facts["temporaries_mb"] = round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 1)
        facts["program"] = compiled.as_text()

        def train():
            nonlocal state
            state, _ = compiled(state, data)
            return state.step

        calls["train"] = train
    return calls, jax.block_until_ready, facts


def work(name, settings, tasks, threads, options):
    """Runs a variant's process."""
    if threads:
        turns.pin(threads)
    sys.path.insert(0, str(ROOT))
    if name in OURS:
        calls, wait, facts = our_calls(*settings, tasks, **options)
        facts.pop("program", None)
    else:
        import torch_peer

        calls, wait, facts = torch_peer.calls(*settings, tasks, threads, **options)
    turns.serve(calls, wait, facts)


class Measurement:
    """The measurement of one model in one dtype: first pass and rounds. `record` is the dict that is stored."""

    def __init__(self, model, dtype, arguments, record, store):
        self.settings = model, arguments.batch, arguments.size, dtype
        self.arguments, self.record, self.store = arguments, record, store
        self.variants = peers(model, arguments.modes) | {name: OURS[name] for name in arguments.ours}
        if unknown := set(arguments.peers) - set(self.variants):
            print(f"--peers: {model} has no {sorted(unknown)}, but {list(self.variants)}", file=sys.stderr)
            raise SystemExit(2)

    def begin(self, name, task):
        """Starts a variant's process."""
        from regnet_flax import start

        environment = {"GLIBC_TUNABLES": start.TUNABLES} if self.arguments.huge_pages else {}
        python = self.arguments.python if name in OURS else sys.executable
        todo = name, self.settings, [task], self.arguments.threads, self.variants[name]
        return turns.Worker(name, [python, __file__, "--worker", json.dumps(todo)], environment)

    def workers(self, names, task):
        """Starts the processes of these variants, by name; one that fails is left out with a message.

        On a CPU they compile in parallel. A GPU's libraries choose kernels by timing them, so there they start in turn.
        """
        ready = {}
        begun = {name: self.begin(name, task) for name in names} if self.arguments.threads else {}
        for name in names:
            try:
                ready[name] = (begun.get(name) or self.begin(name, task)).ready()
            except turns.WorkerError as error:
                print(f"left out: {error}", flush=True)
        return ready

    def warm(self, names, task):
        """Fills PyTorch's cache of compiled programs for a GPU, all at once: each takes a minute and one core.

        What PyTorch chooses by timing, each variant chooses again when its turn comes: see torch_peer.calls.
        """
        if "graphs" not in self.arguments.modes or len(names) < 2:
            return
        for worker in [self.begin(name, task) for name in names]:
            with contextlib.suppress(turns.WorkerError):  # it fails again when its turn comes
                worker.ready()
            worker.close()

    def first_pass(self, task, end):
        """Gives PyTorch's variants one turn each, until time `end`; None marks a failed one.

        Compiling takes about a minute, so if eager variants are tried, only the two fastest of them are compiled.
        """
        found = self.record["first_pass"].setdefault(task, {})
        theirs = {name: options for name, options in self.variants.items() if name not in OURS}
        eager = [name for name, options in theirs.items() if options["mode"] == "eager"]
        for name in eager:
            self.first_turn(name, task, found, end)
        fastest = [theirs[name] for name in self.best(task, eager)]
        rest = [
            name
            for name, options in theirs.items()
            if name not in eager and (not eager or options | {"mode": "eager"} in fastest)
        ]
        if time.monotonic() < end:
            self.warm([name for name in rest if name not in found], task)
        for name in rest:
            self.first_turn(name, task, found, end)

    def first_turn(self, name, task, found, end):
        """Stores a variant's images per second in `found`, unless they are there."""
        if name in found:
            return
        if found and time.monotonic() > end:
            print(f"{self.settings[0]}, {TASKS[task]}: {name} not tried, no time left", flush=True)
            return
        found[name] = None
        for worker in self.workers([name], task).values():
            count = self.steps(worker, task)
            found[name] = round(self.settings[1] / worker.seconds(task, count), 1)
            worker.close()
        print(f"{self.settings[0]}, {TASKS[task]}: {name} {found[name]} images/s", flush=True)
        self.store()

    def steps(self, worker, task):
        """Returns how many steps fill a variant's turn."""
        return max(1, round(self.arguments.seconds / worker.seconds(task, 1)))

    def best(self, task, names):
        """Returns the two fastest of these in the first pass."""
        rates = {name: rate for name, rate in self.record["first_pass"][task].items() if rate and name in names}
        return sorted(rates, key=rates.get, reverse=True)[:2]

    def rounds(self, task):
        """Measures images per second and ratios to PyTorch's best, by variant."""
        peers = self.arguments.peers or self.best(task, self.variants)
        workers = self.workers([*self.arguments.ours, *peers], task)
        if missing := set(self.arguments.ours) - set(workers):
            print(f"{self.settings[0]}, {TASKS[task]}: {', '.join(sorted(missing))} failed", file=sys.stderr)
            raise SystemExit(1)
        counts = {name: self.steps(worker, task) for name, worker in workers.items()}
        times = {name: [] for name in workers}
        for number in range(self.arguments.rounds):
            for name in list(workers)[:: 1 if number % 2 else -1]:
                times[name].append(workers[name].seconds(task, counts[name]))
        theirs = [name for name in workers if name not in OURS]
        best = min(theirs, key=lambda name: statistics.median(times[name])) if theirs else None
        found = self.record.setdefault(task, {})
        found.clear()
        for name, worker in workers.items():
            worker.close()
            where = worker.facts.pop("environment", {})
            self.record |= {key: where[key] for key in where if key != "command"}  # that is the child process's command
            found[name] = {"facts": worker.facts, "seconds_a_step": [round(t, 6) for t in times[name]]}
            found[name] |= spread("images_per_second", [self.settings[1] / t for t in times[name]], 1)
            if best:
                ratios = [a / b for a, b in zip(times[best], times[name], strict=True)]
                found[name] |= spread("ratio", ratios, 3)
        self.store()


def spread(name, values, digits):
    """Returns the median and the range."""
    low, high = round(min(values), digits), round(max(values), digits)
    return {name: round(statistics.median(values), digits), f"{name}_range": [low, high]}


def table(results):
    """Formats the results as a Markdown table."""
    lines = ["| model | type | | variant | images/s | ratio to PyTorch's best |", "| --- " * 6 + "|"]
    for result in results:
        for task, words in TASKS.items():
            for name, found in result.get(task, {}).items():
                cells = [result["model"], result["dtype"], words, name]
                for figure, form in (("images_per_second", ",.0f"), ("ratio", ".2f")):
                    if figure in found:
                        low, high = found[f"{figure}_range"]
                        cells.append(f"{found[figure]:{form}} ({low:{form}} to {high:{form}})")
                    else:  # no PyTorch variant took part
                        cells.append("–")
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet20", "regnet20_convlstm"])
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--ours", nargs="+", default=["ours"], choices=list(OURS))
    parser.add_argument("--modes", nargs="*", default=MODES, choices=[*MODES, "graphs"], help="graphs: on a GPU")
    parser.add_argument("--peers", nargs="+", default=[], help="names of PyTorch's variants, to skip the first pass")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one variant's turn")
    parser.add_argument("--threads", type=int, default=2, help="threads and cores of every process; 0: all")
    parser.add_argument("--huge-pages", action="store_true", help="the command line's GLIBC_TUNABLES for all sides")
    parser.add_argument("--python", default=sys.executable, help="interpreter for our side, if not this one")
    parser.add_argument("--minutes", type=float, default=60.0, help="after these the first pass starts no variant")
    parser.add_argument("--first-pass", action="store_true", help="no rounds")
    parser.add_argument("--out", default="", help="JSON file")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    arguments = parse()
    if arguments.worker:
        work(*json.loads(arguments.worker))
        return
    version = subprocess.run(
        [arguments.python, "-c", "import platform; print(platform.python_version())"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout.strip()
    given = [f"python{version}" if word == arguments.python else word for word in sys.argv[1:]]
    command = shlex.join(["python", "benchmarks/versus_torch.py", *given])
    end, out = time.monotonic() + 60 * arguments.minutes, pathlib.Path(arguments.out)
    results = json.loads(out.read_text())["results"] if arguments.out and out.exists() else []

    def store():
        if arguments.out:
            out.write_text(json.dumps({"results": results}, indent=1) + "\n")

    for model in arguments.models:
        for dtype in arguments.dtypes:
            key = {"model": model, "dtype": dtype, "batch": arguments.batch, "size": arguments.size}
            key |= {"threads": arguments.threads, "huge_pages": arguments.huge_pages}
            alike = [result for result in results if key.items() <= result.items()]
            record = next((result for result in alike if result["our_python"] == version), None)
            if record is None:
                record = key | {"our_python": version, "first_pass": alike[0]["first_pass"] if alike else {}}
                results.append(record)
            measurement = Measurement(model, dtype, arguments, record, store)
            for task in arguments.tasks:
                if not arguments.peers:
                    measurement.first_pass(task, end)
                if not arguments.first_pass:
                    record["command"] = command
                    measurement.rounds(task)
            print(table([record]), flush=True)


if __name__ == "__main__":
    main()
