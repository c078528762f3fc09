"""Weights & Biases, the extra [wandb]; what its own environment variables say holds, such as WANDB_MODE=offline."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from regnet_flax.trackers.registry import PROJECT, Start


class Run:
    """A run of the project WANDB_PROJECT, or "regnet_flax"; its files are in the workdir's wandb/."""

    def __init__(self, start: Start):
        # Without a key W&B would ask for one while the run waits.
        os.environ.setdefault("WANDB_LOGIN_TIMEOUT", "10")
        import wandb  # pyright: ignore[reportMissingImports]

        settings = wandb.Settings(
            console="off",  # it would put itself between the display and the terminal
            silent=True,
            finish_timeout=120,  # seconds to upload what is left; `wandb sync` does it later
        )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=start.name,
            group=start.group or None,
            id=start.id or None,
            resume="allow" if start.id else None,
            dir=start.workdir,
            reinit="create_new",
            settings=settings,
        )
        self.id = self._run.id
        # W&B's own count of steps only rises, and a run that was killed logs some again.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def config(self, values: Mapping[str, Any]) -> None:
        self._run.config.update(dict(values), allow_val_change=True)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def finish(self, error: str) -> None:
        self._run.finish(exit_code=1 if error else 0)
