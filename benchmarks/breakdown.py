"""Where the time of training and inference goes: milliseconds of a step by part of the model, from XLA's own trace.

    python benchmarks/breakdown.py --out breakdown.json

A native operation counts by its name. Any other traced operation counts for the part of the model in which its root
was traced, including everything fused into it. On a CPU, XLA's convolutions and products run in Eigen's own threads and
are not traced: without native operations, they make up most of the remaining time, called "not traced".
"""

import argparse
import collections
import glob
import gzip
import itertools
import json
import re
import tempfile
import time

import jax
import numpy as np
import versus_torch

from regnet_flax.environment import environment

STEPS = 5
REGULATOR = re.compile(r"ConvLSTM|ConvGRU|ConvRNN|/regulator/")
CONVOLUTION = re.compile(r"/(conv\d*|conv_fuse|shortcut_conv)/(jit\(\w+\)/)?\w+$")
NATIVE = {
    "convolution": "convolutions, forward",
    "input_gradient": "convolutions, gradients of inputs",
    "filter_gradient": "convolutions, gradients of kernels",
    "convolution_gradients": "convolutions, all gradients and that of the normalisation after them",
    "moments": "batch normalisation, statistics",
    "norm_gradient_sums": "batch normalisation, gradients",
    "norm_gradient": "batch normalisation, gradients",
} | {f"{cell}_{way}": f"regulator, {way}" for cell in ("rnn", "gru", "lstm") for way in ("forward", "backward")}


def part(where, native):
    """Returns the part of the model of an operation traced in `where`, or of a native operation."""
    if native:
        return NATIVE[native]
    if "RegNet)" not in where:
        return "loss and SGD"
    direction = "backward" if "transpose(" in where else "forward"
    if REGULATOR.search(where):
        return f"regulator, {direction}"
    if CONVOLUTION.search(where):
        return f"convolutions, {direction}"
    return f"batch normalisation, ReLU, shortcuts, {direction}"


def traced(run, wait):
    """Returns milliseconds per step of each operation, by its name in the compiled program."""
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(STEPS):
                wait(run())
        (path,) = glob.glob(f"{directory}/**/*.trace.json.gz", recursive=True)
        with gzip.open(path) as file:
            events = json.load(file)["traceEvents"]
    times = collections.Counter()
    for event in events:
        if event.get("ph") == "X" and "hlo_op" in event.get("args", {}):
            times[event["args"]["hlo_op"]] += event["dur"] / 1000 / STEPS
    return times


def breakdown(model, task, batch, size, dtype):
    """Returns milliseconds of a step by part, largest first, and those of the whole step without a trace."""
    calls, wait, facts = versus_torch.our_calls(model, batch, size, dtype, (task,))
    times = []
    for _ in range(3 + 2 * STEPS):
        began = time.perf_counter()
        wait(calls[task]())
        times.append(1000 * (time.perf_counter() - began))
    step = float(np.median(times[3:]))
    lines = re.findall(r"^ *(?:ROOT )?%(\S+) = .*?([\w-]+)\((.*)$", facts.pop("program"), re.MULTILINE)
    programs = {
        name: (opcode, re.search(r'op_name="([^"]*)"', rest), re.search(r'target="regnet_flax_(\w+)"', rest))
        for name, opcode, rest in lines
    }
    parts = collections.Counter()
    for name, milliseconds in traced(calls[task], wait).items():
        opcode, where, native = programs.get(name, ("", None, None))
        if opcode not in ("call", "while", "conditional"):  # the operations that they call are counted
            parts[part(where[1], native and native[1]) if where else "the rest"] += milliseconds
    facts.pop("environment")  # it is in the file once
    parts["not traced"] = step - sum(parts.values())
    return {"step_ms": round(step, 1), "parts_ms": {k: round(v, 1) for k, v in parts.most_common()}, "facts": facts}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet20", "regnet20_convlstm"])
    parser.add_argument("--tasks", nargs="+", default=list(versus_torch.TASKS), choices=versus_torch.TASKS)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--out", default="")
    arguments = parser.parse_args()
    results = {}
    for model, task in itertools.product(arguments.models, arguments.tasks):
        found = breakdown(model, task, arguments.batch, arguments.size, arguments.dtype)
        results.setdefault(model, {})[task] = found
        head = "| part | ms | share |\n| --- | --- | --- |"
        print(f"\n{model}, {versus_torch.TASKS[task]}: {found['step_ms']} ms per step\n\n{head}")
        for name, milliseconds in found["parts_ms"].items():
            print(f"| {name} | {milliseconds} | {milliseconds / found['step_ms']:.0%} |")
    if arguments.out:
        with open(arguments.out, "w") as file:
            file.write(json.dumps({"measured": results} | environment(jax.local_devices()[:1]), indent=1) + "\n")


if __name__ == "__main__":
    main()
