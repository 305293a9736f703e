"""MLflow: a database beside the run folders (mlruns/mlflow.db), or where MLFLOW_TRACKING_URI says."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Mapping
from contextlib import nullcontext

from filelock import FileLock

from cotune.trackers.base import Tracked

_STATUS = {"done": "FINISHED", "no-data": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
_AT_ONCE = 100  # parameters that a server takes in one request: MLflow's own limit
# Nothing is told to MLflow's makers, and a server that is down costs seconds, not the minutes of its own defaults.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
}


class MlflowTracker:
    """Raises what MLflow raises.

    A metric that is logged again with the same step and time is one metric to MLflow's databases, so earlier rows may
    come again. The plain client is used: MLflow's fluent calls would add the user, the command and the commit.
    """

    def __init__(self, run: Tracked) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        with warnings.catch_warnings():  # its and SQLAlchemy's deprecations are nothing that a user could mend
            warnings.simplefilter("ignore")
            from mlflow import MlflowClient
            from mlflow.entities import Metric, Param

            logging.getLogger("mlflow").setLevel(logging.ERROR)  # how it makes its tables, and what it cuts
            uri, place = os.environ.get("MLFLOW_TRACKING_URI"), run.folder.parent / "mlruns"
            if not uri:
                place.mkdir(exist_ok=True)
            # Runs of a study begin together, and the tables must be made once.
            with nullcontext() if uri else FileLock(place / ".lock"):
                self._client = MlflowClient(uri or f"sqlite:///{place / 'mlflow.db'}")
                experiment = self._experiment(None if uri else (place / "artifacts").as_uri())
        self._metric, self._last = Metric, (0, time.time())
        self.id = self._continued(run.known) or str(
            self._client.create_run(experiment, run_name=run.folder.name).info.run_id
        )
        params = [Param(name, str(value)) for name, value in run.settings.items()]
        for at in range(0, len(params), _AT_ONCE):
            self._client.log_batch(self.id, params=params[at : at + _AT_ONCE])

    def _experiment(self, artifacts: str | None) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "cotune")
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found else self._client.create_experiment(name, artifacts))

    def _continued(self, known: str | None) -> str | None:
        """`known`, when it is in this store: another one may have been named since."""
        from mlflow.exceptions import MlflowException

        try:
            if known:
                self._client.update_run(known, status="RUNNING")
            return known
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def log(self, numbers: Mapping[str, float], i: int, tokens: int, time: float) -> None:
        self._last = tokens, time
        metrics = [self._metric(name, value, int(1000 * time), tokens) for name, value in numbers.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def end(self, status: str, results: Mapping[str, float]) -> None:
        self.log(results, -1, *self._last)
        self._client.set_tag(self.id, "cotune.status", status)
        self._client.set_terminated(self.id, _STATUS[status])
