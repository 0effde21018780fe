"""Curves for MLflow: a run of a server (MLFLOW_TRACKING_URI), else in the folder `mlruns` beside the runs.

Its credentials (MLFLOW_TRACKING_USERNAME, _PASSWORD, _TOKEN) are read by MLflow itself from the environment.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from cluster.storage import Storage
from configs.errors import ConfigError
from jobs.trackers.base import Ids

STATES = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
# A server takes so many in one request.
PARAMETERS_AT_ONCE = 100
LONGEST_PARAMETER = 500


class MlflowRun:
    """One MLflow run, the same for all attempts and resumes. A step that comes again has two values there."""

    errors = (MlflowException, OSError)

    def __init__(self, folder: Storage, run: str, project: str, kept: Ids, settings: Mapping[str, Any]) -> None:
        """Raises ConfigError without a server where storage is not local."""
        self._client = MlflowClient(tracking_uri=_where(folder))
        known = kept.read().get("mlflow")
        if known is None:
            found = self._client.get_experiment_by_name(project)
            experiment = found.experiment_id if found is not None else self._client.create_experiment(project)
            known = self._client.create_run(experiment, run_name=run).info.run_id
            kept.keep("mlflow", known)
            texts = [Param(name, str(value)[:LONGEST_PARAMETER]) for name, value in settings.items()]
            for first in range(0, len(texts), PARAMETERS_AT_ONCE):
                self._client.log_batch(known, params=texts[first : first + PARAMETERS_AT_ONCE])
        else:
            self._client.update_run(known, status="RUNNING")
        self._id = known

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """One request with all figures of a step."""
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(f"train/{name}", v, now, step) for name, v in figures.items()])

    def close(self, state: str) -> None:
        """Tell how it ended."""
        self._client.set_terminated(self._id, STATES.get(state, "FAILED"))


def _where(folder: Storage) -> str:
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if given:
        return given
    local = folder.local_path()
    if local is None:
        raise ConfigError(
            "tracking.trackers: mlflow needs a server where run.storage is no local folder; set MLFLOW_TRACKING_URI "
            "in the environment of the cluster's nodes"
        )
    # MLflow 3 refuses its own format of files unless it is asked for.
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    return f"file:{local.rpartition('/')[0]}/mlruns"
