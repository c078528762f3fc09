"""The program itself, announcing each of its phases: python announced.py FD ARGUMENT…

Writes "+NAME" and "-NAME", a line each, into the file descriptor FD as a phase begins and ends, and "=compile" where
XLA begins to compile the step, so that a test can inflict a fault in the midst of it. Nothing else is changed.
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
from regnet_flax.analysis import plots  # noqa: E402
from regnet_flax.data import sources  # noqa: E402
from regnet_flax.modes import train as loop  # noqa: E402
from regnet_flax.training.checkpoint import Checkpoints  # noqa: E402
from regnet_flax.training.trainer import Program  # noqa: E402

announce("-import")

# What is lowered is compiled next, by XLA alone.
LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: event == LOWERED and announce(f"={'compile' if compiled else 'initialize'}")
)

train = Program.train


def train_or_compile(*args, **kwargs):
    compiled.append(True)
    return announcing(train, "compile" if len(compiled) == 1 else "train")(*args, **kwargs)


Program.train = train_or_compile
Program.evaluate = announcing(Program.evaluate, "evaluate")
Checkpoints.save = announcing(Checkpoints.save, "save")
loop.write_figures = announcing(loop.write_figures, "figures")
plots.curves = announcing(plots.curves, "curves")
sources.load_dataset = announcing(sources.load_dataset, "data")

sys.argv[1:] = sys.argv[2:]
main.console()
