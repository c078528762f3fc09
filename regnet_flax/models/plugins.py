"""Custom regulators, registered by name in modules that a config can import."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from regnet_flax.errors import one_line
from regnet_flax.models.registry import MODELS, family
from regnet_flax.models.regnet import CELLS
from regnet_flax.models.regulators import REGULATORS, Regulator

Cell = TypeVar("Cell", bound=type[Regulator])


def register_regulator(name: str) -> Callable[[Cell], Cell]:
    """Registers your own regulator by name; use it as a decorator of the class.

    Every depth then has a model with it, such as "regnet20_mycell" and "se_regnet50_mycell", for `create_model`,
    `list_models` and configs. So do the other families, such as "wrn28_10_mycell", which are not listed. Exports,
    `--mode summary`, `--mode compare` and `analysis.features` know it too. A cell defines `gate_names`,
    `state_names` and `step`; see `Regulator`. A cell with weights other than its gates' overrides `__call__`, and a
    cell that does not use each weight once per pixel overrides `multiply_adds`.

        import jax.numpy as jnp
        from flax import linen as nn
        from regnet_flax import create_model, register_regulator
        from regnet_flax.models.regulators import Regulator

        @register_regulator("leaky")
        class Leaky(Regulator):
            gate_names = ("z", "h")

            def step(self, x, state, weights):
                (h,) = state
                z, candidate = self.convolve(x, h, weights, 0, 2)
                gates = {"z": nn.sigmoid(z), "h": jnp.tanh(candidate)}
                return (gates["z"] * h + gates["h"],), gates

        model = create_model("regnet20_leaky")

    The command line imports the module with `--config.model.plugins="('my_module',)"`.

    A regulator gets no random numbers, so it cannot have dropout: results would depend on the number of devices. A
    regulator with batch statistics needs `share_regulator=False`; `self.is_mutable_collection("batch_stats")` tells it
    whether the model is training. Otherwise `model.init` raises ValueError.

    Args:
      name: an ASCII identifier.

    Returns:
      The decorator, which returns the class unchanged.

    Raises:
      ValueError: the name is not an identifier or belongs to another class, or the class is not a `Regulator`.
    """
    if not (isinstance(name, str) and name.isascii() and name.isidentifier()):
        raise ValueError(
            f'{name!r} is not a name for a regulator: use an identifier, as in @register_regulator("mycell")'
        )

    def register(cell: Cell) -> Cell:
        if not (isinstance(cell, type) and issubclass(cell, Regulator)):
            raise ValueError(f"{cell!r} cannot be registered: it must be a subclass of regnet_flax's Regulator")
        known = CELLS.get(name)
        # The same class again means that a module or a notebook cell ran again.
        if known and (known.__module__, known.__qualname__) != (cell.__module__, cell.__qualname__):
            owner = f"{known.__module__}.{known.__qualname__}"
            raise ValueError(f"a regulator {name!r} exists already ({owner}): choose another name")
        REGULATORS[name] = CELLS[name] = cell
        MODELS.update(family([name]))
        return cell

    return register


def import_plugins(names: Sequence[str]) -> None:
    """Imports modules that register regulators; the current directory is searched too.

    Raises:
      ValueError: a module cannot be imported; the message is one line.
    """
    if names and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for name in names:
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:
            raise ValueError(
                f"{name!r} cannot be imported ({one_line(error)}): fix it, run in its directory, or set PYTHONPATH"
            ) from error
