from __future__ import annotations

import pytest

from rlhf_ray.reporting.report.run import differences, flat_settings, key_settings, shown


def test_sections_become_prefixes_and_what_is_no_scalar_text() -> None:
    nested = {
        "algorithm": "PPO",
        "training": {"lr": 2e-4, "critic": None, "advantage_args": {"alpha": 0.5}},
        "rewards": {"functions": [{"name": "gsm8k"}], "weights": [1.0]},
        "debugging": {},
    }
    assert flat_settings(nested) == {
        "algorithm": "PPO",
        "training.lr": 2e-4,
        "training.critic": None,
        "training.advantage_args": '{"alpha": 0.5}',
        "rewards.functions": '[{"name": "gsm8k"}]',
        "rewards.weights": "[1.0]",
    }


@pytest.mark.parametrize(
    ("value", "text"), [("a b", "a b"), (2e-4, "0.0002"), (None, "null"), (True, "true"), (1e-6, "1e-06")]
)
def test_a_setting_is_shown_as_yaml_would_write_it(value: str | float | None, text: str) -> None:
    assert shown(value) == text


def test_key_settings_name_what_is_built_in() -> None:
    settings = {"model.path": None, "data.path": "gsm8k.jsonl", "training.lr": 2e-4, "learners.num_learners": 1}
    assert key_settings(settings) == [("model", "quickstart"), ("data", "gsm8k.jsonl"), ("lr", "0.0002")]


def test_settings_that_differ() -> None:
    first = {"training.lr": 1e-4, "debugging.seed": 0, "reporting.run_dir": "a"}
    second = {"training.lr": 2e-4, "debugging.seed": 0, "reporting.run_dir": "b"}
    assert differences([first, second]) == [("training.lr", ["0.0001", "0.0002"])]
    assert differences([first]) == []


def test_a_setting_that_only_some_have_is_a_difference_only_if_those_differ() -> None:
    runs = [{"a": 1, "b": 1}, {"a": 1}, {"a": 1, "b": 2}]
    assert differences(runs) == [("b", ["1", "", "2"])]
    assert differences([{"a": 1, "b": 1}, {"a": 1}]) == []


def test_a_run_without_settings_differs_in_nothing() -> None:
    assert differences([{}, {"a": 1}]) == []
