"""Fonts for class names in Chinese, Arabic, Devanagari and other scripts that matplotlib's own font lacks."""

from __future__ import annotations

import contextlib
import logging
import pathlib
import warnings
from collections.abc import Iterable, Iterator

from regnet_flax.errors import printable

_OWN = "DejaVu Sans"
# Fonts that have a glyph for every character, but no readable one.
_NO_TEXT = ("Last Resort", "Adobe Blank")

logger = logging.getLogger("regnet_flax")


@contextlib.contextmanager
def readable(names: Iterable[str]) -> Iterator[None]:
    """Makes figures show these names with the machine's own fonts; warns if no font has a character."""
    import matplotlib

    missing = {c for name in names for c in printable(name) if ord(c) > 127} - _characters(_OWN)
    families = [_OWN]
    for family, characters in _others() if missing else ():
        if found := characters & missing:
            families.append(family)
            missing -= found
    if missing:
        logger.warning(
            "no installed font has the characters %s of the class names, which figures show as boxes: install one, "
            "such as Noto Sans (fonts-noto-cjk, fonts-noto-core)",
            "".join(sorted(missing)[:10]),
        )
    with warnings.catch_warnings(), matplotlib.rc_context({"font.family": families} if len(families) > 1 else {}):
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def _others() -> Iterator[tuple[str, set[str]]]:
    """Yields the font families that matplotlib finds, each with its characters."""
    from matplotlib import font_manager

    seen = set()
    # Regular fonts first: text would otherwise be set in bold or italics.
    for font in sorted(font_manager.fontManager.ttflist, key=lambda f: (f.style != "normal", f.weight != 400, f.name)):
        if font.name in seen or font.name.startswith(_NO_TEXT):
            continue
        seen.add(font.name)
        with contextlib.suppress(OSError, RuntimeError):  # FreeType cannot read it
            yield font.name, _charmap(font.fname)


def _characters(family: str) -> set[str]:
    from matplotlib import font_manager

    return _charmap(font_manager.findfont(family))


def _charmap(file: str | pathlib.Path) -> set[str]:
    from matplotlib.ft2font import FT2Font

    return {chr(code) for code in FT2Font(str(file)).get_charmap()}
