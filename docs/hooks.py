"""Extends mkdocs: adds the repository's own files to the site, and renders equations without JavaScript.

Pages link to files of the repository by relative paths, as in [cifar10.py](../../configs/cifar10.py), so that the links
also work in the repository. The site has these files under repo/.
"""

import html
import pathlib
import posixpath
import re

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parent.parent
MIRRORED = (
    *("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "pyproject.toml"),
    *("benchmarks/*.py", "benchmarks/README.md", "benchmarks/results/**/*", "configs/*.py", "notebooks/*.ipynb"),
    *(
        "regnet_flax/**/*.py",
        "regnet_flax/models/ops/cpp/*",
        "regnet_flax/weights/*.md",
        "tests/*.py",
        "tests/*.md",
        "docs/*.py",
    ),
)
LINK = re.compile(r"(\]\()([^)\s#:]+)")
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files, config):
    """Adds the repository's files to the site."""
    for pattern in MIRRORED:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file() and "__pycache__" not in path.parts:
                name = f"repo/{path.relative_to(ROOT).as_posix()}"
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns links out of docs/ into links to repo/, and links into docs/ into links to its pages."""
    folder = posixpath.dirname(page.file.src_uri)

    def link(match):
        target = posixpath.normpath(posixpath.join(folder, match[2]))
        if target.startswith("../"):
            target = f"repo/{target.removeprefix('../')}"
        elif target.startswith("repo/docs/") and target.endswith(".md"):
            target = target.removeprefix("repo/docs/")
        else:
            return match[0]
        return match[1] + posixpath.relpath(target, folder or ".")

    return LINK.sub(link, markdown)


def on_page_content(content, page, config, files):
    """Turns LaTeX into MathML, which browsers render natively."""

    def equation(match):
        return convert(html.unescape(match[2]), display="block" if match[1] == "div" else "inline")

    return EQUATION.sub(equation, content)
