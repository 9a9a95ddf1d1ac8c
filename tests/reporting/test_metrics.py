from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlhf_ray.reporting.metrics import METRICS, flatten, metric_for


def test_flatten_joins_keys_and_leaves_bookkeeping_out(result: dict[str, Any]) -> None:
    row = flatten(result)
    assert row["rollouts/reward_mean"] == 0.5
    assert row["evaluation/openai/gsm8k/reward_mean"] == 0.75
    assert row["time_total_s"] == 4.5
    assert not {"config", "config/training/lr", "hostname", "trial_id", "pid"} & row.keys()


def test_bookkeeping_is_left_out_at_the_top_alone() -> None:
    assert flatten({"pid": 1, "evaluation": {"pid": {"reward_mean": 1.0}}}) == {"evaluation/pid/reward_mean": 1.0}


@pytest.mark.parametrize(
    ("value", "expected"),
    [(np.float32(0.5), 0.5), (np.int64(3), 3), (np.bool_(True), True), (np.array(2.0), 2.0), ("text", "text")],
)
def test_scalars_become_python_values(value: Any, expected: object) -> None:
    assert flatten({"key": value}) == {"key": expected}
    assert type(flatten({"key": value})["key"]) is type(expected)


@pytest.mark.parametrize("value", [[1.0], (1,), np.zeros(2), np.zeros(1), None, object(), {}])
def test_what_is_not_a_scalar_is_left_out(value: Any) -> None:
    assert flatten({"key": value}) == {}


def test_every_key_is_declared_once_with_unit_and_formula() -> None:
    keys = [metric.key for metric in METRICS]
    assert len(keys) == len(set(keys))
    assert all(metric.unit and metric.formula for metric in METRICS)
    assert all("\n" not in metric.formula for metric in METRICS)


@pytest.mark.parametrize(
    ("key", "declared"),
    [
        ("learner/approx_kl", "learner/approx_kl"),
        ("rewards/gsm8k/mean", "rewards/<function>/mean"),
        ("rewards/failures/timeout", "rewards/failures/<kind>"),
        ("rewards/failures/mean", "rewards/<function>/mean"),
        ("evaluation/openai/gsm8k/reward_mean", "evaluation/<dataset>/reward_mean"),
    ],
)
def test_a_key_finds_its_declaration(key: str, declared: str) -> None:
    metric = metric_for(key)
    assert metric is not None
    assert metric.key == declared


def test_an_undeclared_key_finds_none() -> None:
    assert metric_for("learner/unheard_of") is None
    assert metric_for("learner/approx_kl/extra") is None


def test_what_the_console_reads_is_declared() -> None:
    from rlhf_ray.reporting import panel

    assert [key for _, _, key, _ in panel._NUMBERS if metric_for(key) is None] == []
