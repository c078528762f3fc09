"""MLflow, the extra [mlflow]; the store is MLFLOW_TRACKING_URI's, or MLflow's default."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from regnet_flax.trackers.registry import PROJECT, Start

BATCH = 100  # parameters; the most that MLflow takes at once


class Run:
    """A run of the experiment MLFLOW_EXPERIMENT_NAME, or "regnet_flax"."""

    def __init__(self, start: Start):
        # MLflow would wait for minutes for a server that does not answer, and training with it.
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

        # MLflow keeps what a parameter was first; a resumed run may have some otherwise.
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
