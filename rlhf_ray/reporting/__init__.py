"""Where the results of a run are shown and stored."""

from __future__ import annotations

from rlhf_ray.reporting.metrics import METRICS, Metric, flatten, metric_for
from rlhf_ray.reporting.reporter import Reporter
from rlhf_ray.reporting.reporter_set import ReporterSet
from rlhf_ray.reporting.run_directory import RunDirectory

__all__ = ["METRICS", "Metric", "Reporter", "ReporterSet", "RunDirectory", "flatten", "metric_for"]
