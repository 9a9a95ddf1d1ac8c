"""MLflow, in a database of the run directory or on a tracking server."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_ray.config.nested import flatten
from rlhf_ray.config.settings import Settings
from rlhf_ray.errors import ConfigError
from rlhf_ray.reporting.metrics import Scalar
from rlhf_ray.reporting.reporter import Reporter
from rlhf_ray.reporting.run_directory import RunDirectory, kept_id

__all__ = ["MlflowReporter"]

# What one request of MLflow's protocol may hold.
_MOST_METRICS, _MOST_PARAMS, _LONGEST_PARAM = 1000, 100, 6000
_NOT_IN_A_DATABASE = re.compile(r"\?|%[0-9A-Fa-f]{2}")
_NOT_IN_A_NAME = re.compile(r"[^\w\-. :/]")


class MlflowReporter(Reporter):
    """Logs metrics and settings to an MLflow run named like the run directory; a resumed run continues it.

    Raises:
        ConfigError: MLflow is not installed, or the tracking server cannot be used.
    """

    def __init__(self, settings: Settings, run_dir: RunDirectory) -> None:
        experiment, uri = settings.reporting.mlflow_experiment, _tracking_uri(settings, run_dir)
        try:
            from mlflow import MlflowClient
            from mlflow.exceptions import MlflowException
        except ImportError as error:
            remedy = "MLflow is missing: install rlhf-ray[mlflow]"
            raise ConfigError("reporting.mlflow_experiment", experiment, remedy) from error
        try:
            self._client = MlflowClient(tracking_uri=uri)
            self._run_id = kept_id(run_dir.mlflow_run_id, lambda: _new_run(self._client, str(experiment), run_dir))
            self._client.update_run(self._run_id, status="RUNNING")
        except MlflowException as error:
            raise ConfigError("reporting.mlflow_uri", uri, f"MLflow cannot use it: {error}") from error

    def report(self, row: Mapping[str, Scalar]) -> None:
        """Log the iteration's numbers."""
        from mlflow.entities import Metric

        step, now = int(row["training_iteration"]), int(time.time() * 1000)
        numbers = {name: float(value) for name, value in row.items() if isinstance(value, (int, float))}
        metrics = [Metric(_NOT_IN_A_NAME.sub("_", name), value, now, step) for name, value in numbers.items()]
        for part in _parts(metrics, _MOST_METRICS):
            self._client.log_batch(self._run_id, metrics=part)

    def stop(self) -> None:
        """Mark the MLflow run as finished."""
        self._client.set_terminated(self._run_id)


def _tracking_uri(settings: Settings, run_dir: RunDirectory) -> str:
    if given := settings.reporting.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI"):
        return given
    uri = f"sqlite:///{run_dir.mlflow}"
    # MLflow reads them as a URI does: it writes elsewhere, or retries for minutes to open what is not there.
    if found := _NOT_IN_A_DATABASE.search(uri):
        remedy = f"MLflow opens no database below a folder with {found[0]!r} in its path"
        raise ConfigError(
            "reporting.run_dir", str(run_dir.path), f"{remedy}; name another, or set reporting.mlflow_uri"
        )
    return uri


def _new_run(client: Any, experiment: str, run_dir: RunDirectory) -> str:
    from mlflow.entities import Param

    known = client.get_experiment_by_name(experiment)
    experiment_id = known.experiment_id if known else client.create_experiment(experiment)
    run_id = str(client.create_run(experiment_id, run_name=run_dir.name).info.run_id)
    settings = flatten(run_dir.read_config())
    params = [Param(name, str(value)[:_LONGEST_PARAM]) for name, value in settings.items()]
    for part in _parts(params, _MOST_PARAMS):
        client.log_batch(run_id, params=part)
    return run_id


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
