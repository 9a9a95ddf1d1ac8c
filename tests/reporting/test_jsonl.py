from __future__ import annotations

import json
from typing import Any

from rlhf_ray.config.settings import Settings
from rlhf_ray.reporting import RunDirectory, flatten
from rlhf_ray.reporting.jsonl import JsonlReporter


def strict(text: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    row: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return row


def test_one_flat_object_per_iteration(run_dir: RunDirectory, result: dict[str, Any]) -> None:
    reporter = JsonlReporter(Settings(), run_dir)
    reporter.report(flatten(result))
    # Read before stop(): each line is there when report() returns.
    assert strict(run_dir.metrics.read_text())["rollouts/reward_mean"] == 0.5
    reporter.report(flatten({**result, "training_iteration": 4}))
    reporter.stop()
    rows = [strict(line) for line in run_dir.metrics.read_text().splitlines()]
    assert [row["training_iteration"] for row in rows] == [3, 4]
    assert not any(isinstance(value, (dict, list)) for row in rows for value in row.values())


def test_nan_and_infinity_become_null(run_dir: RunDirectory, result: dict[str, Any]) -> None:
    reporter = JsonlReporter(Settings(), run_dir)
    reporter.report(flatten(result))
    reporter.stop()
    row = strict(run_dir.metrics.read_text())
    assert row["learner/value_loss"] is None
    assert row["learner/ratio_max"] is None
    assert row["learner/approx_kl"] == 0.00123


def test_a_resumed_run_appends(run_dir: RunDirectory) -> None:
    for iteration in (1, 2):
        reporter = JsonlReporter(Settings(), run_dir)
        reporter.report({"training_iteration": iteration})
        reporter.stop()
    assert len(run_dir.metrics.read_text().splitlines()) == 2
