"""What the report draws: every chart and the metrics in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_ray.reporting.metrics import METRICS

__all__ = ["CHARTS", "Chart", "Curve", "chart_contents", "curve_keys"]

_METRICS = {metric.key: metric for metric in METRICS}


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric of a chart."""

    key: str
    """As declared in ``METRICS``; ``<name>`` stands for every name that a run has."""
    label: str
    style: Literal["line", "points"] = "line"
    """``points`` are measured now and then: dots on a thin line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Curves over one axis."""

    title: str
    curves: tuple[Curve, ...]
    from_zero: bool = False
    """Whether the axis begins at 0, for amounts whose size matters and not only their change."""
    stacked: bool = False
    """Whether the curves are parts of a whole; of several runs, each part is then a chart of its own."""
    expected: bool = True
    """Whether the page says so when no run has it."""


CHARTS: tuple[Chart, ...] = (
    Chart(
        title="Reward",
        curves=(
            Curve("rollouts/reward_mean", "training"),
            Curve("evaluation/<dataset>/reward_mean", "evaluation", "points"),
        ),
    ),
    Chart(
        title="Reward functions",
        curves=(Curve("rewards/<function>/mean", ""),),
        expected=False,
    ),
    Chart(title="KL of the update", curves=(Curve("learner/approx_kl", "approx_kl"),)),
    Chart(
        title="KL to the reference",
        curves=(Curve("learner/kl_to_reference", "kl_to_reference"),),
    ),
    Chart(title="Entropy", curves=(Curve("learner/entropy", "entropy"),), from_zero=True),
    Chart(
        title="Clipped tokens",
        curves=(Curve("learner/clip_fraction", "clip_fraction"),),
        from_zero=True,
    ),
    Chart(
        title="Completion length",
        curves=(Curve("rollouts/completion_tokens_mean", "mean"), Curve("rollouts/completion_tokens_max", "longest")),
        from_zero=True,
    ),
    Chart(
        title="Truncated completions",
        curves=(Curve("rollouts/truncated_fraction", "truncated"),),
        from_zero=True,
    ),
    Chart(
        title="Staleness",
        curves=(Curve("rollouts/staleness_mean", "mean"), Curve("rollouts/staleness_max", "largest")),
        from_zero=True,
    ),
    Chart(
        title="Time of an iteration",
        curves=(
            Curve("timers/rollout_s", "rollout"),
            Curve("timers/reward_s", "reward"),
            Curve("timers/advantage_s", "advantage"),
            Curve("timers/update_s", "update"),
            Curve("timers/weight_sync_s", "weight sync"),
        ),
        from_zero=True,
        stacked=True,
    ),
    Chart(
        title="Tokens per second",
        curves=(Curve("rollouts/tokens_per_s", "rollouts"), Curve("learner/tokens_per_s", "learner")),
        from_zero=True,
    ),
    Chart(title="Policy loss", curves=(Curve("learner/policy_loss", "policy loss"),)),
    Chart(
        title="Value loss",
        curves=(Curve("learner/value_loss", "value loss"),),
        from_zero=True,
    ),
    Chart(
        title="Explained variance",
        curves=(Curve("learner/explained_variance", "explained variance"),),
    ),
    Chart(
        title="Gradient norm",
        curves=(Curve("learner/grad_norm", "policy"), Curve("learner/critic_grad_norm", "critic")),
        from_zero=True,
    ),
    Chart(
        title="Engine against learner",
        curves=(
            Curve("learner/sampling_logprob_diff_mean", "mean"),
            Curve("learner/sampling_logprob_diff_max", "largest"),
        ),
        from_zero=True,
        expected=False,
    ),
)


def curve_keys(keys: Iterable[str]) -> list[str]:
    """Those keys of a run that some chart draws."""
    return [key for key in keys if any(_name(curve.key, key) is not None for curve in _curves())]


def chart_contents(keys: Iterable[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Fit the charts to what the runs recorded.

    Args:
        keys: Metrics that some run has a number for.

    Returns:
        The charts with something to show, as the page reads them, and the titles of those expected in vain.
    """
    found = sorted(set(keys))
    drawn, missing = [], []
    for chart in CHARTS:
        curves = [content for curve in chart.curves for content in _curve_contents(curve, found)]
        # One function is the reward itself.
        if chart.title == "Reward functions" and len(curves) < 2:
            continue
        if curves:
            drawn.append(_content(chart, curves))
        elif chart.expected:
            missing.append(chart.title)
    return drawn, missing


def _content(chart: Chart, curves: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "title": chart.title,
        "unit": _METRICS[chart.curves[0].key].unit,
        "fromZero": chart.from_zero,
        "stacked": chart.stacked,
        "curves": curves,
    }


def _curve_contents(curve: Curve, keys: Iterable[str]) -> Iterator[dict[str, Any]]:
    for key in keys:
        name = _name(curve.key, key)
        if name is not None:
            label = " ".join(part for part in (curve.label, name) if part)
            formula = _METRICS[curve.key].formula
            yield {"key": key, "label": label, "points": curve.style == "points", "formula": formula}


def _name(declared: str, key: str) -> str | None:
    """The text for the name in a declared key, ``""`` where it has none; nothing if the keys are different ones."""
    before, opening, rest = declared.partition("<")
    if not opening:
        return "" if key == declared else None
    after = rest.partition(">")[2]
    long_enough = len(key) > len(before) + len(after)
    return key[len(before) : len(key) - len(after)] if _surrounds(before, key, after) and long_enough else None


def _surrounds(before: str, key: str, after: str) -> bool:
    return key.startswith(before) and key.endswith(after)


def _curves() -> Iterator[Curve]:
    for chart in CHARTS:
        yield from chart.curves
