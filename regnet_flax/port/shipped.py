"""The trained weights that come with the package, by name: "regnet20_convlstm.cifar10"."""

from __future__ import annotations

import os
import pathlib

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "weights"
SUFFIX = ".safetensors"


def list_weights() -> list[str]:
    """Returns the names of the trained weights that come with the package, for `load` and `model.init_from`.

    A name is that of the model and of its data set. The card of each lies beside it, as NAME.safetensors.md.
    """
    return sorted(path.name.removesuffix(SUFFIX) for path in FOLDER.glob(f"*{SUFFIX}"))


def alternatives(verb: str = "") -> str:
    """Returns the end of an error's sentence that names them; "" if there are none."""
    names = ", ".join(list_weights())
    return f", or {verb}{' ' * bool(verb)}one of the package's own: {names}" if names else ""


def find(name: str | os.PathLike[str]) -> pathlib.Path | None:
    """Returns the file of weights with this name; None if the package has none, or if there is a local file of it."""
    if os.fspath(name) not in list_weights() or os.path.exists(name):
        return None
    return FOLDER / f"{name}{SUFFIX}"
