"""After each iteration: MLflow, in a database of the run directory or on a tracking server."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import yaml

from rlhf_ray.config.settings import Settings
from rlhf_ray.errors import ConfigError
from rlhf_ray.reporting.metrics import flatten
from rlhf_ray.reporting.reporter import Reporter
from rlhf_ray.reporting.run_directory import RunDirectory

__all__ = ["MlflowReporter"]

Item = TypeVar("Item")

# What one request of MLflow's protocol may hold.
_MOST_METRICS, _MOST_PARAMS, _LONGEST_PARAM = 1000, 100, 6000
_NOT_IN_A_DATABASE = re.compile(r"\?|%[0-9A-Fa-f]{2}")
_NOT_IN_A_NAME = re.compile(r"[^\w\-. :/]")


class MlflowReporter(Reporter):
    """Logs metrics and settings to an MLflow run named like the run directory; a resumed run goes on in it."""

    def __init__(self) -> None:
        self._client: Any = None
        self._run_id = ""

    def start(self, settings: Settings, run_dir: RunDirectory) -> None:
        """Find or start the MLflow run.

        Raises:
            ConfigError: MLflow is not installed, or the tracking server cannot be used.
        """
        reporting = settings.reporting
        uri = reporting.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            uri = f"sqlite:///{run_dir.mlflow}"
            # MLflow reads them as a URI does: it writes elsewhere, or retries for minutes to open what is not there.
            if found := _NOT_IN_A_DATABASE.search(uri):
                remedy = f"MLflow opens no database below a folder with {found[0]!r} in its path"
                raise ConfigError(
                    "reporting.run_dir", str(run_dir.path), f"{remedy}; name another, or set reporting.mlflow_uri"
                )
        try:
            from mlflow import MlflowClient
            from mlflow.exceptions import MlflowException
        except ImportError as error:
            raise ConfigError(
                "reporting.mlflow_experiment",
                reporting.mlflow_experiment,
                "MLflow is missing: install rlhf-ray[mlflow]",
            ) from error
        try:
            client = MlflowClient(tracking_uri=uri)
            self._run_id = _known_run(run_dir) or _new_run(client, str(reporting.mlflow_experiment), run_dir)
            client.update_run(self._run_id, status="RUNNING")
        except MlflowException as error:
            raise ConfigError("reporting.mlflow_uri", uri, f"MLflow cannot use it: {error}") from error
        self._client = client

    def report(self, result: Mapping[str, Any]) -> None:
        """Log the iteration's numbers."""
        from mlflow.entities import Metric

        if self._client is None:
            raise RuntimeError("report() before start()")
        row = flatten(result)
        step, now = int(row["training_iteration"]), int(time.time() * 1000)
        numbers = {name: float(value) for name, value in row.items() if isinstance(value, (int, float))}
        metrics = [Metric(_NOT_IN_A_NAME.sub("_", name), value, now, step) for name, value in numbers.items()]
        for part in _parts(metrics, _MOST_METRICS):
            self._client.log_batch(self._run_id, metrics=part)

    def stop(self) -> None:
        """Mark the MLflow run as finished."""
        if self._client is not None:
            self._client.set_terminated(self._run_id)
            self._client = None


def _known_run(run_dir: RunDirectory) -> str | None:
    file = run_dir.mlflow_run_id
    return file.read_text(encoding="utf-8") if file.exists() else None


def _new_run(client: Any, experiment: str, run_dir: RunDirectory) -> str:
    from mlflow.entities import Param

    known = client.get_experiment_by_name(experiment)
    experiment_id = known.experiment_id if known else client.create_experiment(experiment)
    run_id = str(client.create_run(experiment_id, run_name=run_dir.name).info.run_id)
    settings = yaml.safe_load(run_dir.config.read_text(encoding="utf-8")) if run_dir.config.exists() else {}
    sections = {section: values for section, values in settings.items() if isinstance(values, dict)}
    params = [Param("algorithm", str(settings.get("algorithm")))] + [
        Param(f"{section}.{name}", str(value)[:_LONGEST_PARAM])
        for section, values in sections.items()
        for name, value in values.items()
    ]
    for part in _parts(params, _MOST_PARAMS):
        client.log_batch(run_id, params=part)
    run_dir.mlflow_run_id.write_text(run_id, encoding="utf-8")
    return run_id


def _parts(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
