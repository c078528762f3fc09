"""Reads the finished workdirs of several models × several seeds, and what they tell: means, spreads and differences."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from regnet_flax.analysis import summary
from regnet_flax.models.ops import current_options
from regnet_flax.models.plugins import import_plugins
from regnet_flax.models.registry import create_model
from regnet_flax.models.regnet import CELLS

CONFIDENCE = 0.95
_HE = {20: 8.75, 32: 7.51, 44: 7.17, 56: 6.97, 110: 6.43}  # arXiv 1512.03385, table 6; 110 is the best of five runs
_XU = {"cifar10": 1.51, "cifar100": 2.04}  # points that RegNet-20 is below ResNet-20; arXiv 2101.00590


@dataclasses.dataclass(frozen=True)
class Result:
    """One model's finished run.

    Attributes:
      label: model and options.
      regulator: its kind, "" where there is none.
      parameters: how many.
      multiply_adds: for one image.
      seeds: that were trained.
      error: of each seed at the end of training, in percent of the test images.
      top5_error: likewise; empty where there are no more than five classes.
      seconds: wall time of all seeds together.
      claim: what was published of this model on this data set, "" for nothing.
      curves: from "train_loss" and "test_error" (percent) to epochs (k,) and values (seeds, k).
      config: config.json.
      environment: "hardware", "versions" and "command" of results.json.
    """

    label: str
    regulator: str
    parameters: int
    multiply_adds: int
    seeds: tuple[int, ...]
    error: tuple[float, ...]
    top5_error: tuple[float, ...]
    seconds: float
    claim: str
    curves: dict[str, tuple[np.ndarray, np.ndarray]]
    config: dict[str, Any]
    environment: dict[str, Any]


def read(label: str, workdir: pathlib.Path) -> Result:
    """One model's result, from the config.json, results.json and metrics.jsonl of its workdir."""
    config, results = (json.loads((workdir / f"{name}.json").read_text()) for name in ("config", "results"))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    seeds = tuple(config.get("seeds", [config["seed"]]))
    own = results.get("seeds") or {str(config["seed"]): results}
    last = [own[str(seed)]["last"] for seed in seeds]
    import_plugins(config["model"].get("plugins", ()))
    overrides = current_options(config["model"]["overrides"])
    overrides = {name: value for name, value in overrides.items() if value is not None}
    model = create_model(config["model"]["name"], num_classes=config["dataset"]["num_classes"], **overrides)
    parts = summary.summarize(model, tuple(config["image_shape"]))
    regulator = getattr(model, "regulator", None)
    regulated = getattr(model, "regulated_stages", None) != ()
    return Result(
        label=label,
        regulator=CELLS[regulator].__name__ if regulator and regulated else "",
        parameters=results["parameters"],
        multiply_adds=sum(part.multiply_adds for part in parts),
        seeds=seeds,
        error=tuple(100 * (1 - line["eval_accuracy"]) for line in last),
        top5_error=tuple(100 * (1 - line["eval_top5_accuracy"]) for line in last if "eval_top5_accuracy" in line),
        seconds=results["wall_time_seconds"],
        claim=claim(config["model"]["name"], config["dataset"]["name"]) if not overrides else "",
        curves={
            "train_loss": _curve(lines, seeds, "train_loss"),
            "test_error": _curve(lines, seeds, "eval_accuracy", lambda accuracy: 100 * (1 - accuracy)),
        },
        config=config,
        environment={name: results[name] for name in ("hardware", "versions", "command")},
    )


def _curve(lines: Sequence[Mapping[str, Any]], seeds: Sequence[int], name: str, convert=lambda value: value):
    chosen = [line for line in lines if name in line]
    own = [[line.get("seeds", {}).get(str(seed), line)[name] for line in chosen] for seed in seeds]
    return np.array([line["epoch"] for line in chosen]), convert(np.array(own))


def claim(model: str, dataset: str) -> str:
    """The published test error of a model by its own recipe on a data set, "" where none is known."""
    if dataset in _XU and model.startswith("regnet20_"):
        return f"up to {_XU[dataset]} points below ResNet-20 (Xu et al.)"
    depth = model.removeprefix("resnet")
    if dataset == "cifar10" and depth.isdecimal() and int(depth) in _HE:
        return f"{_HE[int(depth)]} % error (He et al.)"
    return ""


def deviation(values: Sequence[float]) -> float | None:
    """The standard deviation of a sample, n − 1 in the denominator; None for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def difference(values: Sequence[float], baseline: Sequence[float]) -> tuple[float, float | None]:
    """How far the mean of one sample is from that of another, by Welch's t.

    Returns:
      The difference, and half the width of its 95 % interval; None where a sample has a single value.
    """
    between = float(np.mean(values) - np.mean(baseline))
    if min(len(values), len(baseline)) < 2:
        return between, None
    from scipy.special import stdtrit

    # Variances of the two means.
    first, second = (float(np.var(sample, ddof=1)) / len(sample) for sample in (values, baseline))
    if first + second == 0:
        return between, 0.0
    freedom = (first + second) ** 2 / (first**2 / (len(values) - 1) + second**2 / (len(baseline) - 1))
    return between, float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * math.sqrt(first + second)
