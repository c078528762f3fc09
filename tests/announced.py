"""Runs the program and announces each of its phases: python announced.py FD ARGUMENT…

Writes the lines "+NAME" and "-NAME" to the file descriptor FD when a phase begins and ends, and "=compile" when XLA
begins to compile the step, so that a test can inflict a fault in the middle. Nothing else is changed.
"""

import functools
import os
import sys

fd = int(sys.argv[1])
compiled = []


def announce(text):
    os.write(fd, f"{text}\n".encode())


def announcing(function, name):
    @functools.wraps(function)
    def announced(*args, **kwargs):
        announce(f"+{name}")
        try:
            return function(*args, **kwargs)
        finally:
            announce(f"-{name}")

    return announced


announce("+import")
import jax  # noqa: E402

from regnet_flax import main  # noqa: E402
from regnet_flax.analysis.plots import training  # noqa: E402
from regnet_flax.data import sources  # noqa: E402
from regnet_flax.modes import train as loop  # noqa: E402
from regnet_flax.training.checkpoint import Checkpoints  # noqa: E402
from regnet_flax.training.trainer import Trainer  # noqa: E402

announce("-import")

# XLA compiles a function right after it is lowered. JAX's names of the step, of evaluation beside it, and of `init`.
LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
NAMES = {"jit(_fun)": "compile", "jit(init)": "initialize"}
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, fun_name="", **__: event == LOWERED and fun_name in NAMES and announce(f"={NAMES[fun_name]}")
)

train, compile_ahead = Trainer.train, Trainer.compile_ahead


def begin_to_compile(*args, **kwargs):
    announce("+compile")  # until the first step is done
    compile_ahead(*args, **kwargs)


def train_or_compile(*args, **kwargs):
    compiled.append(True)
    if len(compiled) > 1:
        return announcing(train, "train")(*args, **kwargs)
    try:
        return train(*args, **kwargs)
    finally:
        announce("-compile")


Trainer.compile_ahead = begin_to_compile
Trainer.train = train_or_compile
Trainer.evaluate = announcing(Trainer.evaluate, "evaluate")
Checkpoints.save = announcing(Checkpoints.save, "save")
loop.write_figures = announcing(loop.write_figures, "figures")
training.curves = announcing(training.curves, "curves")
sources.load_dataset = announcing(sources.load_dataset, "data")

sys.argv[1:] = sys.argv[2:]
main.console()
