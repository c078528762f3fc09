"""All figures, one module per subject; the only package that imports matplotlib."""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from regnet_flax.errors import printable
from regnet_flax.start import is_program

TRAIN, TEST, DROP = "#1f77b4", "#d62728", "#999999"


def pyplot() -> Any:
    """Returns pyplot, with a backend that can write files anywhere.

    If pyplot is already imported, as in a notebook, its backend stays. A program that a notebook starts inherits
    MPLBACKEND, which may name a backend that is not installed there.
    """
    if "matplotlib.pyplot" in sys.modules:
        return sys.modules["matplotlib.pyplot"]
    backend = os.environ.pop("MPLBACKEND", None)  # an unknown name would end the import
    try:
        import matplotlib
        from matplotlib import pyplot
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    try:
        pyplot.switch_backend("Agg" if is_program() or not backend else backend)
    except (ImportError, ValueError):
        matplotlib.use("Agg")
    return pyplot


def write(figure: Any, path: pathlib.Path, **options: Any) -> None:
    """Writes a figure and closes it; `options` go to savefig.

    All text is drawn literally. It contains the names of classes, files and folders, in which matplotlib would read
    text between dollar signs as mathematics, and would fail on bytes that are not UTF-8.
    """
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if said := text.get_text():  # numbers at ticks come later, and a user's style may write them as mathematics
            text.set_parse_math(False)
            text.set_text("\n".join(map(printable, said.split("\n"))))
    figure.savefig(path, **options)
    pyplot().close(figure)


def marker(points: Sequence[float]) -> str | None:
    """Returns the marker for a curve: one with few points needs it, because a line of one point is invisible."""
    return "o" if len(points) < 5 else None
