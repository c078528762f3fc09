"""Trackers for Weights & Biases, MLflow and Trackio, each of which is an extra.

Their own environment variables apply, such as WANDB_MODE=offline.
"""

from __future__ import annotations

import contextlib
import contextvars
import io
import os
import secrets
import time
from collections.abc import Mapping
from typing import Any

from regnet_flax.trackers.registry import PROJECT, Start

BATCH = 100  # the largest number of parameters that MLflow takes at once


class Wandb:
    """A run of Weights & Biases, in the project WANDB_PROJECT or "regnet_flax", with its files in the workdir."""

    def __init__(self, start: Start):
        # Without a key, W&B would ask for one, and the run would wait.
        os.environ.setdefault("WANDB_LOGIN_TIMEOUT", "10")
        import wandb  # pyright: ignore[reportMissingImports]

        settings = wandb.Settings(
            console="off",  # otherwise it redirects the terminal, which breaks the live display
            silent=True,
            init_timeout=30,  # seconds for a server that does not answer, while training waits
            finish_timeout=120,  # seconds to upload the rest; `wandb sync` can do it later
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
        # W&B's own step may only increase, but a killed run logs some steps again.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def config(self, values: Mapping[str, Any]) -> None:
        self._run.config.update(dict(values), allow_val_change=True)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def finish(self, error: str) -> None:
        self._run.finish(exit_code=1 if error else 0)


class Mlflow:
    """A run of MLflow, in the experiment MLFLOW_EXPERIMENT_NAME or "regnet_flax" of the store MLFLOW_TRACKING_URI."""

    def __init__(self, start: Start):
        # Otherwise MLflow, and with it training, waits for minutes for a server that does not answer.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        import mlflow  # pyright: ignore[reportMissingImports]

        self._client, self.id = mlflow.MlflowClient(), start.id
        if self.id:
            self._client.update_run(self.id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        tags = {"workdir": str(start.workdir)} | ({"group": start.group} if start.group else {})
        self.id = self._client.create_run(experiment, run_name=start.name, tags=tags).info.run_id

    def config(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param  # pyright: ignore[reportMissingImports]

        # MLflow refuses to change a parameter, which a resumed run may have changed.
        known = self._client.get_run(self.id).data.params
        new = [Param(name, str(value)) for name, value in values.items() if name not in known]
        for first in range(0, len(new), BATCH):
            self._client.log_batch(self.id, params=new[first : first + BATCH])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now = round(1000 * time.time())
        self._client.log_batch(self.id, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def finish(self, error: str) -> None:
        self._client.set_terminated(self.id, "FAILED" if error else "FINISHED")


class Trackio:
    """A run of Trackio, in the project TRACKIO_PROJECT or "regnet_flax"."""

    def __init__(self, start: Start):
        self._start, self._run = start, None
        # Trackio resumes by name, so no other run may have the same name.
        self.id = start.id or f"{start.name} {secrets.token_hex(3)}"

    def config(self, values: Mapping[str, Any]) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        # In a context of its own, because Trackio ends the previous run of the same context.
        context = contextvars.copy_context()
        with contextlib.redirect_stdout(io.StringIO()):
            self._run = context.run(
                trackio.init,
                os.environ.get("TRACKIO_PROJECT", PROJECT),
                name=self.id,
                group=self._start.group or None,
                config=dict(values),
                resume="allow" if self._start.id else "never",
                embed=False,
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        assert self._run is not None
        self._run.log(dict(values), step=step)

    def finish(self, error: str) -> None:
        assert self._run is not None
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()
