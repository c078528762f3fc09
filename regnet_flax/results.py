"""Collects the results of a finished run for results.json, and reports them."""

from __future__ import annotations

import datetime
import logging
import pathlib
from typing import Any

import numpy as np

from regnet_flax.analysis import summary
from regnet_flax.files import duration
from regnet_flax.training import workdir
from regnet_flax.training.run import Run

logger = logging.getLogger("regnet_flax")


def collect_results(run: Run, config: Any, path: pathlib.Path, test: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the contents of results.json.

    Args:
      run: the finished run.
      config: its resolved config.
      path: the workdir.
      test: metrics of the test split, named "step" and "test_…", if a validation split chose the checkpoint.
    """
    lines = [workdir.mean_line(line, run.failed) for line in workdir.read_metrics(path)]
    rates = [line["images_per_second"] for line in lines if "images_per_second" in line]
    return {
        "model": config.model.name,
        "dataset": config.dataset.name,
        "seed": config.seed,
        "step": run.step,
        **_last_and_best(lines),
        **({} if test is None else {"test": {k: v for k, v in test.items() if k != "seeds"}}),
        "parameters": summary.count_parameters(run.state.params) // len(run.seeds),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "wall_time_seconds": round(run.seconds, 1),
        "images_per_second": round(float(np.median(rates)), 1) if rates else None,
        **_of_seeds(lines, run, test),
        **run.environment,
    }


def _last_and_best(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the last evaluation and the one with the highest accuracy, from lines of metrics.jsonl."""
    evals = [{k: v for k, v in line.items() if k in ("step", "epoch") or k.startswith("eval_")} for line in lines]
    evals = [line for line in evals if "eval_accuracy" in line]
    return {"last": evals[-1] if evals else None, "best": workdir.best_line(evals)}


def _of_seeds(lines: list[dict[str, Any]], run: Run, test: dict[str, Any] | None) -> dict[str, Any]:
    """Returns each seed's results if there are several; the run's "best" has the highest mean."""
    if len(run.seeds) < 2:
        return {}
    found = {}
    for seed in map(str, run.left):
        found[seed] = _last_and_best([workdir.seed_line(line, seed) for line in lines])
        if test is not None:
            found[seed]["test"] = {k: v for k, v in test.items() if k != "seeds"} | test["seeds"][seed]
    failed = {str(seed): reason for seed, reason in run.failed.items()}
    return {"seeds": found} | ({"failed": failed} if failed else {})


def report(results: dict[str, Any], path: pathlib.Path) -> None:
    """Logs how a finished run ended, and where its files are."""
    split = "validation" if "test" in results else "test"
    means = f", means of {len(results['seeds'])} seeds" if "seeds" in results else ""
    if results["last"]:
        logger.info(
            "%s: %s accuracy %.2f %% at the end, %.2f %% at best (step %d)%s; %s parameters, %s",
            results["model"],
            split,
            100 * results["last"]["eval_accuracy"],
            100 * results["best"]["eval_accuracy"],
            results["best"]["step"],
            means,
            f"{results['parameters']:,}",
            duration(results["wall_time_seconds"]),
        )
    if "test" in results:
        test = results["test"]
        logger.info("test accuracy %.2f %% at step %d%s", 100 * test["test_accuracy"], test["step"], means)
    for reason in results.get("failed", {}).values():
        logger.warning("%s: left out", reason)
    logger.info("results: %s, pictures: %s", path / workdir.RESULTS, path / workdir.FIGURES)
