"""--mode eval: a checkpoint of a workdir, or a file of weights, on the test split."""

from __future__ import annotations

from typing import Any

from regnet_flax.command_line import Options
from regnet_flax.modes.train import evaluate_only


def run(config: Any, options: Options) -> None:
    """Evaluates the checkpoint `eval.checkpoint` of the workdir, or `model.init_from`; see `evaluate_only`."""
    evaluate_only(config, options.workdir)
