from __future__ import annotations

import inspect

import pytest
from ray import cloudpickle

from rlhf_ray import rewards
from rlhf_ray.errors import ConfigError
from rlhf_ray.rewards.registry import build_reward, built_in_names, is_factory

FIELD = "rewards.functions[0]"


def build(name: str, **arguments: object) -> object:
    return build_reward(name, arguments, field=FIELD, value=name)


def test_the_public_names_are_the_registered_ones() -> None:
    assert built_in_names() == (
        "environment",
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
        ("org/none", {}, r"called 'org/none' \(all: environment, exact_match, format"),
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
