"""Metrics as curves that stay small, whatever the length of the run."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_ray.reporting.metrics import Scalar
from rlhf_ray.reporting.report.charts import curve_keys

__all__ = ["MAX_POINTS", "Curves", "read_curves"]

MAX_POINTS = 1000
_DIGITS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """The curves of a run over three x axes; all lists have the same length, at most ``MAX_POINTS``."""

    iteration: Sequence[int]
    samples: Sequence[int] | None
    """Completions trained on since the beginning; nothing where the run did not count them."""
    seconds: Sequence[float] | None
    """Wall time of the iterations since the beginning."""
    values: Mapping[str, Sequence[float | None]]
    """Key of a metric -> its values; keys without a number are left out."""
    rows_per_point: int
    """How many iterations a point stands for."""


def read_curves(rows: Sequence[Mapping[str, Scalar | None]]) -> Curves:
    """Take the curves that the report draws from a run's rows, one an iteration.

    Where there are more rows than points, a point is the mean of consecutive rows, or their maximum for a metric that
    is one (``..._max``); its x is that of the last of them.
    """
    width = max(1, -(-len(rows) // MAX_POINTS))
    buckets = [rows[start : start + width] for start in range(0, len(rows), width)]
    ends = [len(bucket) for bucket in buckets]
    last = [end - 1 for end in itertools.accumulate(ends)]
    keys = dict.fromkeys(key for row in rows for key in row)
    values = {key: [_point(bucket, key) for bucket in buckets] for key in curve_keys(keys)}
    seconds = _increasing(_column(rows, "time_total_s"))
    samples = _increasing(list(itertools.accumulate(_column(rows, "rollouts/num_completions"))))
    return Curves(
        iteration=[int(rows[index]["training_iteration"] or 0) for index in last],
        samples=None if samples is None else [int(samples[index]) for index in last],
        seconds=None if seconds is None else [_rounded(seconds[index]) for index in last],
        values={key: points for key, points in values.items() if any(point is not None for point in points)},
        rows_per_point=width,
    )


def _point(bucket: Sequence[Mapping[str, Scalar | None]], key: str) -> float | None:
    numbers = [number for row in bucket if (number := _number(row.get(key))) is not None]
    if not numbers:
        return None
    return _rounded(max(numbers) if key.endswith("_max") else sum(numbers) / len(numbers))


def _column(rows: Sequence[Mapping[str, Scalar | None]], key: str) -> list[float]:
    # What is measured before the first iteration (evaluation.at_start) has taken no iteration's time or completions.
    numbers = [0.0 if row["training_iteration"] == 0 else _number(row.get(key)) for row in rows]
    complete = [number for number in numbers if number is not None]
    # An axis with holes has no place for some of the points.
    return complete if len(complete) == len(rows) else []


def _increasing(axis: list[float]) -> list[float] | None:
    """An axis that goes one way; a clock that began again, in a run that went on elsewhere, is none."""
    return axis if axis and all(here < there for here, there in itertools.pairwise(axis)) else None


def _number(value: Scalar | None) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _rounded(value: float) -> float:
    """To the digits that a chart can show: they are most of the page's size."""
    return float(f"{value:.{_DIGITS}g}")
