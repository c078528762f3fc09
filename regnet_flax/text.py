"""Text that is shown: names of files and classes, and errors, whatever is in them."""

from __future__ import annotations


def printable(text: str) -> str:
    """Returns the text with what no terminal shows, such as a file name's newlines and stray bytes, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def one_line(error: BaseException) -> str:
    """Returns the exception's type and message as one line of bounded length."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:297] + "..."
