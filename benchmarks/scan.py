"""The costs and savings of `nn.scan` over a stage's blocks.

    python benchmarks/scan.py --out scan.json

Training steps of a network with its blocks under an unrolled scan against the same network with a Python loop, in
alternating rounds; and the time to compile a rolled scan of 110 layers against one of 20.
"""

import argparse
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from regnet_flax import create_model, xla_flags
from regnet_flax.environment import environment
from regnet_flax.models.regnet import unstack_blocks
from regnet_flax.training import optimizer
from regnet_flax.training import step as steps

tx = optimizer.make_optimizer("sgd", lambda count: jnp.float32(0.1), weight_decay=1e-4)


def train_step(model):
    return jax.jit(functools.partial(steps.train_step, apply_fn=model.apply, tx=tx), donate_argnums=0)


def initial_state(model, images):
    variables = jax.jit(functools.partial(model.init, train=False))(jax.random.key(0), images[:1])
    return steps.create_train_state(variables, tx)


def step_times(name, batch, rounds):
    """Returns seconds of a training step, scanned and looped, in alternating rounds."""
    rng = np.random.default_rng(0)
    data = {
        "images": jnp.asarray(rng.normal(size=(batch, 32, 32, 3)), jnp.float32),
        "labels": jnp.asarray(rng.integers(0, 10, batch), jnp.int32),
    }
    scanned, looped = create_model(name, unroll=99), create_model(name, scan=False)
    state = initial_state(scanned, data["images"])
    # A copy, because each step donates its state.
    variables = jax.tree.map(jnp.copy, {"params": state.params, "batch_stats": state.batch_stats})
    states = {"scan": state, "loop": steps.create_train_state(unstack_blocks(variables), tx)}
    functions = {"scan": train_step(scanned), "loop": train_step(looped)}
    times = {"scan": [], "loop": []}
    for round_number in range(rounds + 1):
        for kind in ("scan", "loop") if round_number % 2 else ("loop", "scan"):
            begin = time.perf_counter()
            states[kind], _ = jax.block_until_ready(functions[kind](states[kind], data))
            if round_number:  # the first one compiles
                times[kind].append(time.perf_counter() - begin)
    return times


def compile_time(name):
    """Returns seconds to lower and compile a training step with rolled scans."""
    model = create_model(name, unroll=1)
    images = jnp.zeros((128, 32, 32, 3))
    state = jax.eval_shape(lambda: initial_state(model, images))
    data = {"images": images, "labels": jnp.zeros(128, jnp.int32)}
    begin = time.perf_counter()
    train_step(model).lower(state, data).compile()
    return time.perf_counter() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", help="write the figures to this JSON file")
    arguments = parser.parse_args()
    xla_flags.set_defaults()  # as regnet_flax.main does
    results = {"batch": arguments.batch, "rounds": arguments.rounds, "steps_per_second": {}, "compile_seconds": {}}
    for name in ("resnet20", "regnet20_convlstm"):
        times = step_times(name, arguments.batch, arguments.rounds)
        ratios = np.array(times["loop"]) / np.array(times["scan"])
        result = {kind: 1 / float(np.median(values)) for kind, values in times.items()}
        result["scan_to_loop"] = float(np.median(ratios))
        result["scan_to_loop_spread"] = [float(ratios.min()), float(ratios.max())]
        results["steps_per_second"][name] = result
        print(
            f"{name}: {result['scan']:.3f} steps/s scanned, {result['loop']:.3f} looped, ratio "
            f"{result['scan_to_loop']:.3f} (from {ratios.min():.3f} to {ratios.max():.3f})"
        )
    compile_time("regnet8_convlstm")  # the first compilation of a process pays for its start
    seconds = {name: [] for name in ("regnet20_convlstm", "regnet110_convlstm")}
    for _ in range(3):
        for name, values in seconds.items():
            values.append(compile_time(name))
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    results["compile_seconds"] = medians | {"ratio": medians["regnet110_convlstm"] / medians["regnet20_convlstm"]}
    print(f"compiling a rolled scan: {results['compile_seconds']}")
    results |= environment(jax.devices()[:1])
    if arguments.out:
        with open(arguments.out, "w") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
