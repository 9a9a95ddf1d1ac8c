"""What the report draws: every chart and the metrics in it, as curves that stay small for a run of any length."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from rlhf_ray.reporting.metrics import METRICS, Scalar, number
from rlhf_ray.reporting.report.page import rounded

__all__ = ["CHARTS", "MAX_POINTS", "Chart", "Curves", "chart_contents", "curve_keys", "read_curves"]

MAX_POINTS = 1000
_METRICS = {metric.key: metric for metric in METRICS}


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves over one axis."""

    title: str
    curves: Mapping[str, str]
    """Key as declared in ``METRICS`` -> label; ``<name>`` in a key stands for every name that a run has."""
    _: KW_ONLY
    from_zero: bool = False
    """Whether the axis begins at 0, for amounts whose size matters and not only their change."""
    stacked: bool = False
    """Whether the curves are parts of a whole; of several runs, each part is then a chart of its own."""
    expected: bool = True
    """Whether the page says so when no run has it."""


CHARTS: tuple[Chart, ...] = (
    Chart("Reward", {"rollouts/reward_mean": "training", "evaluation/<dataset>/reward_mean": "evaluation"}),
    Chart("Reward functions", {"rewards/<function>/mean": ""}, expected=False),
    Chart("Rewards of environments", {"environment/<name>/reward_mean": ""}, expected=False),
    Chart("Turns", {"environment/<name>/steps_mean": ""}, from_zero=True, expected=False),
    Chart("KL of the update", {"learner/approx_kl": "approx_kl"}),
    Chart("KL to the reference", {"learner/kl_to_reference": "kl_to_reference"}),
    Chart("Entropy", {"learner/entropy": "entropy"}, from_zero=True),
    Chart("Clipped tokens", {"learner/clip_fraction": "clip_fraction"}, from_zero=True),
    Chart(
        "Completion length",
        {"rollouts/completion_tokens_mean": "mean", "rollouts/completion_tokens_max": "longest"},
        from_zero=True,
    ),
    Chart("Truncated completions", {"rollouts/truncated_fraction": "truncated"}, from_zero=True),
    Chart("Staleness", {"rollouts/staleness_mean": "mean", "rollouts/staleness_max": "largest"}, from_zero=True),
    Chart(
        "Time of an iteration",
        {
            "timers/rollout_s": "rollout",
            "timers/reward_s": "reward",
            "timers/advantage_s": "advantage",
            "timers/update_s": "update",
            "timers/weight_sync_s": "weight sync",
        },
        from_zero=True,
        stacked=True,
    ),
    Chart(
        "Tokens per second",
        {"rollouts/tokens_per_s": "rollouts", "learner/tokens_per_s": "learner"},
        from_zero=True,
    ),
    Chart("Policy loss", {"learner/policy_loss": "policy loss"}),
    Chart("Value loss", {"learner/value_loss": "value loss"}, from_zero=True),
    Chart("Explained variance", {"learner/explained_variance": "explained variance"}),
    Chart("Gradient norm", {"learner/grad_norm": "policy", "learner/critic_grad_norm": "critic"}, from_zero=True),
    Chart(
        "Engine against learner",
        {"learner/sampling_logprob_diff_mean": "mean", "learner/sampling_logprob_diff_max": "largest"},
        from_zero=True,
        expected=False,
    ),
)
_DRAWN = [_METRICS[key] for chart in CHARTS for key in chart.curves]


def curve_keys(keys: Iterable[str]) -> list[str]:
    """Those keys of a run that some chart draws."""
    return [key for key in keys if any(metric.match(key) for metric in _DRAWN)]


def chart_contents(keys: Iterable[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Fit the charts to what the runs recorded.

    Args:
        keys: Metrics that some run has a number for.

    Returns:
        The charts with something to show, as the page reads them, and the titles of those expected but empty.
    """
    found = sorted(set(keys))
    drawn, missing = [], []
    for chart in CHARTS:
        curves = list(_curve_contents(chart, found))
        # One function is the reward itself.
        if chart.title == "Reward functions" and len(curves) < 2:
            continue
        if curves:
            unit = _METRICS[next(iter(chart.curves))].unit
            scale = {"unit": unit, "fromZero": chart.from_zero, "stacked": chart.stacked}
            drawn.append({"title": chart.title, **scale, "curves": curves})
        elif chart.expected:
            missing.append(chart.title)
    return drawn, missing


def _curve_contents(chart: Chart, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    for declared, label in chart.curves.items():
        metric = _METRICS[declared]
        for match in filter(None, map(metric.match, keys)):
            key, full_label = match[0], " ".join(part for part in (label, *match.groups()) if part)
            # What is measured now and then is drawn as dots on a thin line.
            points = key.startswith("evaluation/")
            yield {"key": key, "label": full_label, "points": points, "formula": metric.formula}


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """The curves of a run over three x axes; all lists have the same length, at most ``MAX_POINTS``."""

    iteration: Sequence[int]
    samples: Sequence[int] | None
    """Completions trained on since the beginning; unset where the run did not count them."""
    seconds: Sequence[float | None] | None
    """Wall time of the iterations since the beginning."""
    values: Mapping[str, Sequence[float | None]]
    """Key of a metric -> its values; keys without a number are left out."""
    rows_per_point: int
    """How many iterations a point stands for."""


def read_curves(rows: Sequence[Mapping[str, Scalar | None]]) -> Curves:
    """Take the curves that the report draws from a run's rows, one per iteration.

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
        seconds=None if seconds is None else [rounded(seconds[index]) for index in last],
        values={key: points for key, points in values.items() if any(point is not None for point in points)},
        rows_per_point=width,
    )


def _point(bucket: Sequence[Mapping[str, Scalar | None]], key: str) -> float | None:
    numbers = [found for row in bucket if (found := number(row.get(key))) is not None]
    if not numbers:
        return None
    return rounded(max(numbers) if key.endswith("_max") else sum(numbers) / len(numbers))


def _column(rows: Sequence[Mapping[str, Scalar | None]], key: str) -> list[float]:
    # What is measured before the first iteration (evaluation.at_start) has taken no iteration's time or completions.
    numbers = [0.0 if row["training_iteration"] == 0 else number(row.get(key)) for row in rows]
    complete = [found for found in numbers if found is not None]
    # An axis with holes has no place for some of the points.
    return complete if len(complete) == len(rows) else []


def _increasing(axis: list[float]) -> list[float] | None:
    """An axis that increases; ``None`` where a clock began again, in a run that was resumed elsewhere."""
    return axis if axis and all(here < there for here, there in itertools.pairwise(axis)) else None
