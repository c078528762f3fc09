"""The cost of training several seeds of a model together, vmapped or in turn, against one seed.

    python benchmarks/seeds.py --out seeds.json

Training steps of n seeds and of one, in alternating rounds, and the time to compile each.
"""

import argparse
import json
import time

import jax
import numpy as np

from configs import cifar10, digits
from regnet_flax import xla_flags
from regnet_flax.config.resolve import resolve
from regnet_flax.data.sources import load_dataset
from regnet_flax.environment import environment
from regnet_flax.modes.setup.trainers import make_trainer


def programs(config, seeds):
    dataset = load_dataset(config.dataset.name)
    config = resolve(config, dataset)

    def make(count, together):
        config.compare.together = together
        return make_trainer(config, dataset, jax.local_devices(), range(count))

    return {"one seed": make(1, "never"), "vmapped": make(seeds, "always"), "in turns": make(seeds, "never")}


def measure(config, seeds, rounds, calls):
    """Returns each program's seconds to compile, and its median seconds per step."""
    made = programs(config, seeds)
    compile_seconds, states, times = {}, {}, {name: [] for name in made}
    count = made["one seed"].steps_per_call
    for name, program in made.items():
        states[name] = program.initial_state()
        began = time.perf_counter()
        states[name], _, done = program.train(states[name], None, 0, count)
        jax.block_until_ready(done)
        compile_seconds[name] = time.perf_counter() - began
    for number in range(rounds):
        for name in list(made)[:: 1 if number % 2 else -1]:
            began = time.perf_counter()
            for call in range(calls):
                states[name], _, done = made[name].train(states[name], None, count * call, count)
            jax.block_until_ready((states[name], done))
            times[name].append((time.perf_counter() - began) / (calls * count))
    median = {name: float(np.median(values)) for name, values in times.items()}
    return {
        "model": config.model.name,
        "width": config.model.overrides.width or 16,
        "dataset": config.dataset.name,
        "batch_size": config.train.batch_size,
        "seeds": seeds,
        "first_call_seconds": {name: round(value, 2) for name, value in compile_seconds.items()},
        "step_ms": {name: round(1000 * value, 2) for name, value in median.items()},
        "ratio": {name: round(median[name] / median["one seed"], 2) for name in ("vmapped", "in turns")},
    }


def main():
    jax.config.update("jax_enable_compilation_cache", False)  # it has programs of earlier processes
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=3, help="calls of each program per round")
    parser.add_argument("--only", default="", help="the model of a single measurement")
    arguments = parser.parse_args()
    xla_flags.set_defaults()  # as regnet_flax.main does
    small, digits_model, cifar = digits.get_config("regnet14_convlstm"), digits.get_config(), cifar10.get_config()
    small.model.overrides.width = 8
    cifar.dataset.name = "synthetic"
    results = []
    for config in (small, digits_model, cifar):
        if arguments.only in config.model.name + config.dataset.name:
            results.append(measure(config, arguments.seeds, arguments.rounds, arguments.calls))
            print(json.dumps(results[-1], indent=2), flush=True)
    if arguments.out:
        with open(arguments.out, "w") as file:
            file.write(json.dumps({"measured": results} | environment(jax.local_devices()), indent=2) + "\n")


if __name__ == "__main__":
    main()
