"""Finds config files, and the `configs` package that they import from."""

from __future__ import annotations

import pathlib
import sys

from regnet_flax.errors import UsageError

# configs/ stands beside the package, in the repository as in an installation.
ROOT = pathlib.Path(__file__).resolve().parent.parent
DEFAULT_CONFIG = "configs/digits.py"


def find_config(name: str | None) -> str:
    """The config file's path, with its argument if any: as given, or else where the shipped configs are."""
    file, colon, argument = (name or DEFAULT_CONFIG).partition(":")
    for path in (pathlib.Path(file), ROOT / file, ROOT / "configs" / file):
        if path.is_file():
            return f"{path.resolve()}{colon}{argument}"
    shipped = ", ".join(sorted(f"configs/{path.name}" for path in (ROOT / "configs").glob("*.py")))
    raise UsageError(f"--config {file} is not a file: shipped are {shipped}")


def provide_configs(config_file: str) -> None:
    """Lets a config say `from configs import base`, from any directory."""
    own = pathlib.Path(config_file).parent.parent
    root = str(own if (own / "configs" / "base.py").is_file() else ROOT)
    if sys.path[0] != root:
        sys.path.insert(0, root)
