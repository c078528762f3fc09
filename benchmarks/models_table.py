"""The table of all models in docs/models.md: parameters and multiply-adds. Nothing is compiled.

python benchmarks/models_table.py --check    # is it up to date?
python benchmarks/models_table.py --write
"""

import argparse
import itertools
import pathlib
import re
import sys

from regnet_flax import create_model, list_models
from regnet_flax.analysis.summary import summarize
from regnet_flax.models.families.names import OTHERS, RESNETS
from regnet_flax.models.regulators import REGULATORS

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- models: python benchmarks/models_table.py --write -->", "<!-- end of models -->"


def costs(name):
    """Returns (parameters, multiply-adds, image size, classes): 224 pixels and 1000 classes for ImageNet models."""
    imagenet = getattr(create_model(name), "stem", "imagenet") == "imagenet"
    size, classes = (224, 1000) if imagenet else (32, 10)
    parts = summarize(create_model(name, num_classes=classes), (size, size, 3))
    parameters, multiply_adds = (sum(getattr(p, field) for p in parts) for field in ("parameters", "multiply_adds"))
    return parameters, multiply_adds, size, classes


def cell(name):
    parameters, multiply_adds, *_ = costs(name)
    return f"{parameters:,} · {multiply_adds / 1e6:,.1f} M"


def table(names):
    """Returns the table's lines; each name outside the families of many depths gets its own row."""
    lines = [f"| | plain | {' | '.join(f'`_{cell}`' for cell in REGULATORS)} |", "| --- " * 5 + "|"]
    left = set(names)
    for family in (RESNETS, *OTHERS):
        if not family.regulated:
            continue
        for size, prefix in itertools.product(family.listed, ("", "se_")):
            plain, regulated = f"{prefix}{family.plain}{size}", f"{prefix}{family.regulated}{size}"
            row = [plain, *(f"{regulated}_{name}" for name in REGULATORS)]
            shown = f"`{plain}`" if plain == regulated else f"`{plain}`, `{regulated}`"
            lines.append(f"| {shown} | {' | '.join(map(cell, row))} |")
            left -= set(row)
    lines += ["", "| | parameters · multiply-adds | images | classes |", "| --- " * 4 + "|"]
    for name in (name for name in names if name in left):
        *_, size, classes = costs(name)
        lines.append(f"| `{name}` | {cell(name)} | {size}×{size} | {classes} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="exit with 1 if the file's table is not up to date")
    what.add_argument("--write", action="store_true", help="write the table between the file's markers")
    parser.add_argument("--file", type=pathlib.Path, default=PAGE)
    arguments = parser.parse_args()
    text = arguments.file.read_text()
    place = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if len(place.findall(text)) != 1:
        sys.exit(f"{arguments.file} must have one place for the table, from {BEGIN} to {END}")
    lines = table(list_models())
    new = place.sub(lambda _: "\n".join([BEGIN, *lines, END]), text)
    if arguments.write:
        arguments.file.write_text(new)
    elif new != text:
        sys.exit(f"the models in {arguments.file} are out of date: run python benchmarks/models_table.py --write")


if __name__ == "__main__":
    main()
