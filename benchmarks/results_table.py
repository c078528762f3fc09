"""The table of all accuracies in docs/results.md, from the raw files in benchmarks/results.

python benchmarks/results_table.py --check    # is it up to date?
python benchmarks/results_table.py --write

A folder with an about.json holds a run in each of its FOLDER/seedN: config.json, results.json and metrics.jsonl, as the
run wrote them. about.json has "data" and "recipe", as the table shows them.
"""

import json
import math
import os
import pathlib

import numpy as np
import page_table

from regnet_flax.analysis import compare, report
from regnet_flax.environment import describe_hardware
from regnet_flax.models.ops import current_options
from regnet_flax.models.registry import computing_options

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
HEAD = ("model", "test accuracy, %", "95 % interval", "seeds", "data", "recipe", "parameters", "hardware", "finished")


def found():
    """Yields about.json and the results.json of each seed, for each model."""
    for about in sorted(RESULTS.glob("*/about.json")):
        for folder in sorted({path.parent.parent for path in about.parent.glob("*/seed*/results.json")}):
            yield json.loads(about.read_text()), sorted(folder.glob("seed*/results.json"))


def interval(values):
    """Returns the 95 % interval of the mean of a normal sample by Student's t, as text; "—" for a single value."""
    from scipy.special import stdtrit

    if len(values) < 2:
        return "—"
    half = stdtrit(len(values) - 1, (1 + compare.CONFIDENCE) / 2) * compare.deviation(values) / math.sqrt(len(values))
    return f"{np.mean(values) - half:.2f} to {np.mean(values) + half:.2f}"


def row(about, files):
    config = json.loads((files[0].parent / "config.json").read_text())
    options = computing_options(current_options(config["model"]["overrides"]))
    label = " ".join([config["model"]["name"], *(f"{name}={value}" for name, value in options.items())])
    result = compare.read(label, *(file.parent for file in files))
    values = [100 - error for error in result.error]
    links = zip(result.seeds, (os.path.relpath(file, page_table.DOCS) for file in files), strict=True)
    return (
        label,
        report.percent(values),
        interval(values),
        ", ".join(f"[{seed}]({link})" for seed, link in links),
        about["data"],
        about["recipe"],
        f"{result.parameters:,}",
        ", ".join(dict.fromkeys(describe_hardware(environment["hardware"]) for environment in result.environments)),
        max(result.dates),
    )


def table():
    lines = [HEAD, ["---"] * 6 + ["---:"] + ["---"] * 2, *(row(*each) for each in found())]
    return [f"| {' | '.join(cells)} |" for cells in lines]


if __name__ == "__main__":
    page_table.main("results_table.py", __doc__, page_table.DOCS / "results.md", "results", table)
