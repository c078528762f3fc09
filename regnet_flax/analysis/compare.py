"""Reads finished workdirs of several models × several seeds; computes means, spreads and differences."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from regnet_flax.analysis import summary
from regnet_flax.files import read_json_lines
from regnet_flax.models.ops import current_options
from regnet_flax.models.plugins import import_plugins
from regnet_flax.models.registry import computing_options, create_model
from regnet_flax.models.regnet import CELLS

CONFIDENCE = 0.95
_HE = {20: 8.75, 32: 7.51, 44: 7.17, 56: 6.97, 110: 6.43}  # arXiv 1512.03385, table 6; 110 is the best of five runs
# Test error in %, on CIFAR-10 and CIFAR-100; arXiv 2101.00590, table III.
_XU = {
    "resnet20": (8.38, 31.72),
    "regnet20_convrnn": (7.60, 30.03),
    "regnet20_convgru": (7.42, 29.69),
    "regnet20_convlstm": (7.28, 29.81),
    "se_resnet20": (8.02, 31.14),
    "se_regnet20_convrnn": (7.55, 29.63),
    "se_regnet20_convgru": (7.25, 29.08),
    "se_regnet20_convlstm": (6.98, 29.02),
}


@dataclasses.dataclass(frozen=True)
class Result:
    """One model's finished run.

    Attributes:
      label: model and options.
      regulator: its kind, "" for none.
      parameters: the number of parameters.
      multiply_adds: multiply-adds for one image.
      seeds: the seeds that trained to the end.
      failed: the reason for each seed that did not.
      chosen: whether the errors are those of the checkpoint that a validation split chose, or of the last one.
      error: of each seed, in percent of the test images.
      top5_error: likewise; empty if there are no more than five classes.
      seconds: wall time of all seeds together.
      claim: the published error of this model on this data set, "" for none.
      curves: maps "train_loss" and "error" (percent, on the evaluated split) to epochs (k,) and values (seeds, k).
      config: config.json.
      environments: "hardware", "versions" and "command" of each run's results.json.
      dates: the days on which its runs finished, as ISO 8601 in UTC; empty for results of versions before 0.2.
    """

    label: str
    regulator: str
    parameters: int
    multiply_adds: int
    seeds: tuple[int, ...]
    failed: dict[str, str]
    chosen: bool
    error: tuple[float, ...]
    top5_error: tuple[float, ...]
    seconds: float
    claim: str
    curves: dict[str, tuple[np.ndarray, np.ndarray]]
    config: dict[str, Any]
    environments: tuple[dict[str, Any], ...]
    dates: tuple[str, ...] = ()


def read(label: str, *workdirs: pathlib.Path) -> Result:
    """Reads one model's result from the config.json, results.json and metrics.jsonl of its workdirs.

    Args:
      label: model and options.
      workdirs: one run of one or several seeds, or several runs that differ in their seeds only.

    Lines that are missing or damaged in metrics.jsonl are missing in the curves.
    """
    runs = [_read_run(workdir) for workdir in workdirs]
    config, results = runs[0].config, runs[0].results
    import_plugins(config["model"].get("plugins", ()))
    overrides = computing_options(current_options(config["model"]["overrides"]))
    model = create_model(config["model"]["name"], num_classes=config["dataset"]["num_classes"], **overrides)
    parts = summary.summarize(model, tuple(config["image_shape"]))
    regulator = getattr(model, "regulator", None)
    regulated = getattr(model, "regulated_stages", None) != ()
    split = "test" if "test" in results else "eval"
    last = [line for run in runs for line in run.last]
    return Result(
        label=label,
        regulator=CELLS[regulator].__name__ if regulator and regulated else "",
        parameters=results["parameters"],
        multiply_adds=sum(part.multiply_adds for part in parts),
        seeds=tuple(seed for run in runs for seed in run.seeds),
        failed={seed: reason for run in runs for seed, reason in run.results.get("failed", {}).items()},
        chosen=split == "test",
        error=tuple(100 * (1 - line[f"{split}_accuracy"]) for line in last),
        top5_error=tuple(
            100 * (1 - line[f"{split}_top5_accuracy"]) for line in last if f"{split}_top5_accuracy" in line
        ),
        seconds=sum(run.results["wall_time_seconds"] for run in runs),
        claim=claim(config["model"]["name"], config["dataset"]["name"]) if not overrides else "",
        curves={
            "train_loss": _curve(runs, "train_loss"),
            "error": _curve(runs, "eval_accuracy", lambda accuracy: 100 * (1 - accuracy)),
        },
        config=config,
        environments=tuple({name: run.results[name] for name in ("hardware", "versions", "command")} for run in runs),
        dates=tuple(run.results["finished"][:10] for run in runs if "finished" in run.results),
    )


class _Run(NamedTuple):
    config: dict[str, Any]
    results: dict[str, Any]
    lines: list[dict[str, Any]]
    seeds: tuple[int, ...]  # those that did not fail
    last: list[dict[str, Any]]  # each seed's errors


def _read_run(workdir: pathlib.Path) -> _Run:
    config, results = (
        json.loads((workdir / f"{name}.json").read_text(encoding="utf-8")) for name in ("config", "results")
    )
    lines = read_json_lines(workdir / "metrics.jsonl")
    failed = results.get("failed", {})
    seeds = tuple(seed for seed in config.get("seeds", [config["seed"]]) if str(seed) not in failed)
    own = results.get("seeds") or {str(config["seed"]): results}
    return _Run(config, results, lines, seeds, [own[str(s)]["test" if "test" in results else "last"] for s in seeds])


def _curve(runs: Sequence[_Run], name: str, convert=lambda value: value):
    chosen = [{line["epoch"]: line for line in run.lines if name in line} for run in runs]
    # Runs may be evaluated at different epochs.
    epochs = [epoch for epoch in chosen[0] if all(epoch in lines for lines in chosen)]
    own = [
        [lines[epoch].get("seeds", {}).get(str(seed), lines[epoch])[name] for epoch in epochs]
        for run, lines in zip(runs, chosen, strict=True)
        for seed in run.seeds
    ]
    return np.array(epochs), convert(np.array(own))


def claim(model: str, dataset: str) -> str:
    """Returns the published test error of a model with its own recipe on a data set, "" if none is known."""
    said = []
    if model in _XU and dataset in (names := ("cifar10", "cifar100")):
        said.append(f"{_XU[model][names.index(dataset)]} % (Xu et al.)")
    depth = model.removeprefix("resnet")
    if dataset == "cifar10" and depth.isdecimal() and int(depth) in _HE:
        said.append(f"{_HE[int(depth)]} % (He et al.)")
    return ", ".join(said)


def deviation(values: Sequence[float]) -> float | None:
    """Returns the standard deviation of a sample, with n − 1 in the denominator; None for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def difference(values: Sequence[float], baseline: Sequence[float]) -> tuple[float, float | None]:
    """Compares the means of two samples with Welch's t-interval.

    Returns:
      The difference, and half the width of its 95 % interval; None if a sample has a single value.
    """
    between = float(np.mean(values) - np.mean(baseline))
    if min(len(values), len(baseline)) < 2:
        return between, None
    from scipy.special import stdtrit

    # The variances of the two means.
    first, second = (float(np.var(sample, ddof=1)) / len(sample) for sample in (values, baseline))
    if first + second == 0:
        return between, 0.0
    freedom = (first + second) ** 2 / (first**2 / (len(values) - 1) + second**2 / (len(baseline) - 1))
    return between, float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * math.sqrt(first + second)
