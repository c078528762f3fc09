"""The table of all models in docs/models.md: parameters and multiply-adds. Nothing is compiled.

python benchmarks/models_table.py --check    # is it up to date?
python benchmarks/models_table.py --write
"""

import itertools

import page_table

from regnet_flax import create_model, list_models
from regnet_flax.analysis.summary import summarize
from regnet_flax.models.families.names import OTHERS, RESNETS
from regnet_flax.models.regulators import REGULATORS


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


if __name__ == "__main__":
    page_table.main("models_table.py", __doc__, page_table.DOCS / "models.md", "models", lambda: table(list_models()))
