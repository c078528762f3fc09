"""How much memory `model.overrides.remat` saves, and how much time it costs.

    python benchmarks/remat.py --out benchmarks/results/remat_cpu.json

One training step of a network with and without remat: the memory and the floating-point operations of the compiled
step, both as XLA reports them (for the unrolled network: XLA counts a loop's body once); and its time in alternating
rounds on this machine's first device.
"""

import argparse
import functools
import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np

from regnet_flax import create_model, xla_flags
from regnet_flax.environment import environment
from regnet_flax.training import optimizer
from regnet_flax.training import step as steps

KINDS = {"plain": False, "remat": True}
tx = optimizer.make_optimizer("sgd", lambda count: jnp.float32(0.1), weight_decay=1e-4)


def compiled_step(name, size, batch, remat):
    """Returns the compiled training step, and the shapes of its arguments."""
    model = create_model(name, remat=remat, unroll=99)
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
    data = {"images": images, "labels": jax.ShapeDtypeStruct((batch,), jnp.int32)}

    def initial_state():
        variables = model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)), train=False)
        return steps.create_train_state(variables, tx)

    step = functools.partial(steps.train_step, apply_fn=model.apply, tx=tx)
    begin = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(jax.eval_shape(initial_state), data).compile()
    return compiled, jax.jit(initial_state), time.perf_counter() - begin


def analysis(compiled):
    """Returns XLA's analysis of a compiled step."""
    memory = compiled.memory_analysis()
    return {
        "temporary_bytes": memory.temp_size_in_bytes,  # activations and the like, apart from state and batch
        "argument_bytes": memory.argument_size_in_bytes,
        "flops": compiled.cost_analysis()["flops"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="regnet50_convlstm")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", help="write the figures to this JSON file")
    arguments = parser.parse_args()
    xla_flags.set_defaults()  # as regnet_flax.main does
    results = {name: getattr(arguments, name) for name in ("model", "size", "batch", "rounds")}

    functions, states, times = {}, {}, {kind: [] for kind in KINDS}
    for kind, remat in KINDS.items():
        functions[kind], initial_state, seconds = compiled_step(arguments.model, arguments.size, arguments.batch, remat)
        results[kind] = analysis(functions[kind]) | {"compile_seconds": seconds}
        states[kind] = initial_state()
    rng = np.random.default_rng(0)
    data = {
        "images": jnp.asarray(rng.normal(size=(arguments.batch, arguments.size, arguments.size, 3)), jnp.float32),
        "labels": jnp.asarray(rng.integers(0, 10, arguments.batch), jnp.int32),
    }
    for round_number in range(arguments.rounds + 1):
        for kind in KINDS if round_number % 2 else reversed(KINDS):
            begin = time.perf_counter()
            states[kind], _ = jax.block_until_ready(functions[kind](states[kind], data))
            if round_number:  # the first is slower
                times[kind].append(time.perf_counter() - begin)
    for kind, values in times.items():
        results[kind]["step_seconds"] = float(np.median(values))
    ratios = np.array(times["remat"]) / np.array(times["plain"])
    results["remat_to_plain"] = {
        name: results["remat"][name] / results["plain"][name] for name in ("temporary_bytes", "flops")
    } | {"step_seconds": float(np.median(ratios)), "step_seconds_spread": [float(ratios.min()), float(ratios.max())]}
    results["load_average"] = os.getloadavg()[0]
    results |= environment(jax.devices()[:1])
    print(json.dumps(results, indent=2))
    if arguments.out:
        with open(arguments.out, "w") as file:
            json.dump(results, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
