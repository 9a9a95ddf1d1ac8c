"""Around the loop: writes the reference of metrics, ``docs/metrics.md``, from ``rlhf_ray/reporting/metrics.py``.

Run ``python docs/metrics_table.py`` after a change of a metric; a test compares the two.
"""

from __future__ import annotations

import html
from pathlib import Path

from rlhf_ray.reporting.metrics import METRICS, Metric

INTRODUCTION = """\
# Metrics

Written by `docs/metrics_table.py` from `rlhf_ray/reporting/metrics.py`, where each metric is declared; edit that file,
not this one.

These are the keys of a line of `metrics.jsonl`, the tags in TensorBoard and the names in Weights & Biases; the result
of `train()` holds the same numbers nested at each slash: `result["learner"]["approx_kl"]`.

`<name>` in a key stands for any text. A run has those keys that its algorithm gives rise to: without a critic there is
no `learner/value_loss`, without a reference no `learner/kl_to_reference`.
"""
TOP_LEVEL = "iteration"
"""Heading of the keys without a slash."""


def metrics_page() -> str:
    """Return the whole page."""
    sections: dict[str, list[Metric]] = {}
    for metric in METRICS:
        sections.setdefault(section_of(metric), []).append(metric)
    return "\n".join([INTRODUCTION, *(section_text(name, metrics) for name, metrics in sections.items())])


def section_of(metric: Metric) -> str:
    """Return the part of a key before its first slash."""
    section, slash, _ = metric.key.partition("/")
    return section if slash else TOP_LEVEL


def section_text(name: str, metrics: list[Metric]) -> str:
    """Return a section's heading and its table."""
    lines = [f"## {name}", "", "| key | unit | formula |", "|---|---|---|"]
    return "\n".join([*lines, *(row(metric) for metric in metrics), ""])


def row(metric: Metric) -> str:
    """Return a metric's table row."""
    return f"| `{metric.key}` | {cell(metric.unit)} | {cell(metric.formula)} |"


def cell(text: str) -> str:
    """Write text so that a Markdown table shows it as it is."""
    return html.escape(text, quote=False).replace("|", r"\|")


if __name__ == "__main__":
    (Path(__file__).parent / "metrics.md").write_text(metrics_page(), encoding="utf-8")
