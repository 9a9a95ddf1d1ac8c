from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import pytest
from ray import cloudpickle

from rlhf_ray import rewards
from rlhf_ray.config.settings import RewardSettings
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.rewards import resolve_rewards
from rlhf_ray.rewards.registry import build_reward, built_in_names, is_factory, row_check, with_row_check

FIELD = "rewards.functions[0]"


def build(name: str, **arguments: object) -> object:
    return build_reward(name, arguments, field=FIELD, value=name)


def test_the_public_names_are_the_registered_ones() -> None:
    assert built_in_names() == (
        "exact_match",
        "format",
        "gsm8k",
        "length",
        "math_equivalence",
        "overlong",
        "reward_model",
    )
    for name in built_in_names():
        if name == "reward_model":  # A class, not a function that makes one.
            assert is_factory(rewards.RewardModelReward)
            continue
        factory = getattr(rewards, name)
        assert is_factory(factory)
        assert name in rewards.__all__
        assert all(p.kind is p.KEYWORD_ONLY for p in inspect.signature(factory).parameters.values())


@pytest.mark.parametrize("name", ["exact_match", "format", "gsm8k", "length", "math_equivalence"])
def test_a_built_in_bears_its_name_and_travels(name: str) -> None:
    reward = build(name)
    assert reward.__name__ == name
    assert not is_factory(reward)
    copy = cloudpickle.loads(cloudpickle.dumps(reward))
    call = {"prompts": ["p"], "completions": ["#### 72"], "completion_ids": [[1, 2]], "answer": ["72"]}
    assert copy(**call) == reward(**call)
    assert hasattr(copy, "check_row") == (name not in ("format", "length"))


def test_arguments_reach_the_factory() -> None:
    assert build("gsm8k", last_number=True)(completions=["it is 72"], answer=["72"]) == [1.0]
    assert build("length", penalty_per_token=1)(completion_ids=[[1, 2]]) == [-2]


@pytest.mark.parametrize(
    ("name", "arguments", "remedy"),
    [
        ("gsm8", {}, r"nearest: 'gsm8k'"),
        ("org/none", {}, r"called 'org/none' \(all: exact_match, format"),
        ("gsm8k", {"lastnumber": True}, r"no argument 'lastnumber'; nearest: 'last_number'"),
        ("gsm8k", {"last_number": "yes"}, r"last_number must be bool, not str"),
        ("gsm8k", {"answer_column": True}, r"answer_column must be str, not bool"),
        ("exact_match", {"pattern": 3}, r"pattern must be str or none, not int"),
        ("length", {"free_tokens": 1.5}, r"free_tokens must be int, not float"),
        ("overlong", {"max_tokens": 8}, r"overlong needs buffer_tokens"),
        ("overlong", {"max_tokens": 8, "buffer_tokens": 9}, r"overlong\.buffer_tokens = 9"),
    ],
)
def test_wrong_requests_name_the_setting_and_the_remedy(name: str, arguments: dict[str, object], remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy) as caught:
        build(name, **arguments)
    assert caught.value.field == FIELD
    assert caught.value.value == name


def gold(row: Mapping[str, object]) -> None:
    if row["gold"] is None:
        raise ValueError("no gold")


def graded(*, completions: list[str], **columns: object) -> list[float]:
    return [1.0] * len(completions)


graded.check_row = gold


class Judge:
    def __call__(self, *, completions: list[str], **columns: object) -> list[float]:
        return [1.0] * len(completions)

    def check_row(self, row: Mapping[str, object]) -> None:
        if not row["rubric"]:
            raise DataError("the rubric is empty")


def test_every_reward_with_a_check_looks_at_a_row() -> None:
    functions = [Judge(), functools.partial(graded, scale=2), graded, "gsm8k", "length"]
    check = row_check(resolve_rewards(RewardSettings(functions=functions)))
    row = {"rubric": "r", "gold": 1, "answer": "#### 7"}
    check(row)
    with pytest.raises(DataError, match=r"^Judge: the rubric is empty$"):
        check(row | {"rubric": ""})
    with pytest.raises(DataError, match=r"^graded: check_row raised ValueError: no gold$"):
        check(row | {"gold": None})
    with pytest.raises(DataError, match=r"^gsm8k: the row's 'answer' holds no number .*'about 7'"):
        check(row | {"answer": "about 7"})
    with pytest.raises(DataError, match=r"^gsm8k: the reward reads the dataset column 'answer', which is not there"):
        check({"rubric": "r", "gold": 1})


def test_a_row_is_checked_by_parameters_and_by_the_functions_own_check() -> None:
    def scaled(*, completions: Any, scale: Any, **columns: Any) -> list[float]:
        return [1.0]

    def grade(*, completions: Any, answer: Any, **columns: Any) -> list[float]:
        return [1.0]

    def checked(**columns: Any) -> list[float]:
        return [1.0]

    def check_numbers(row: Mapping[str, Any]) -> None:
        if not row["answer"].isdigit():
            raise DataError("no number")

    functions = [functools.partial(scaled, scale=2), grade, with_row_check(checked, check_numbers)]
    check = row_check(resolve_rewards(RewardSettings(functions=functions)))
    check({"answer": "4", "level": 1})
    with pytest.raises(DataError, match="the reward 'scaled' is given 'scale'"):
        check({"answer": "4", "scale": 1})
    with pytest.raises(DataError, match="the reward 'grade' needs the column 'answer'"):
        check({"gold": "4"})
    with pytest.raises(DataError, match="checked: no number"):
        check({"answer": "four"})
