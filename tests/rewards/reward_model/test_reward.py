from __future__ import annotations

from typing import Any

import pytest

from rlhf_ray import PPOConfig, RewardModelReward
from rlhf_ray.config.settings import RewardSettings
from rlhf_ray.errors import ConfigError
from rlhf_ray.rewards.functions import resolve_rewards, reward_models


def test_yaml_and_python_name_the_same_reward() -> None:
    reward = RewardModelReward("models/rm", label="good", num_gpus=0.5, overlong="truncate_left")
    config = PPOConfig().rewards(reward, "length", weights=[1.0, 0.1])
    spec = {"name": "reward_model", "path": "models/rm", "label": "good", "num_gpus": 0.5, "overlong": "truncate_left"}
    again = PPOConfig.from_yaml(config.to_yaml())
    assert again.settings.rewards.functions == [spec, "length"]
    found = resolve_rewards(again.settings.rewards)
    assert (found[0].function, found[0].name, found[0].weight) == (reward, "reward_model", 1.0)
    assert reward_models(config.settings.rewards) == reward_models(again.settings.rewards) == (reward,)


def test_two_reward_models_have_two_names() -> None:
    settings = RewardSettings(functions=[RewardModelReward("a"), {"name": "reward_model", "path": "b"}])
    assert [reward.name for reward in resolve_rewards(settings)] == ["reward_model", "reward_model_2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": ""}, "name the model's folder"),
        ({"overlong": "cut"}, "use one of error, truncate_left"),
        ({"dtype": "float16"}, "use one of auto"),
        ({"max_length": 0}, "must be 1 or more"),
        ({"max_tokens_per_batch": 0}, "must be 1 or more"),
        ({"num_workers": 0}, "must be 1 or more"),
        ({"timeout_s": 0.0}, "greater than 0"),
        ({"num_gpus": -1.0}, "a share below 1"),
        ({"num_gpus": 1.5}, "a whole number"),
    ],
)
def test_what_is_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RewardModelReward(**{"path": "rm", **arguments})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("reward_model", "reward_model needs path"),
        ({"name": "reward_model", "path": "rm", "max_len": 5}, "nearest: 'max_length'"),
        ({"name": "reward_model", "path": "rm", "dtype": "half"}, "must be 'auto' or 'float32' or 'bfloat16'"),
        ({"name": "reward_model", "path": "rm", "num_workers": "two"}, "num_workers must be int"),
        ({"name": "reward_model", "path": "rm", "num_workers": 0}, "must be 1 or more"),
        (RewardModelReward, "makes reward functions and is none"),
    ],
)
def test_a_wrong_spec_names_the_setting(spec: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        resolve_rewards(RewardSettings(functions=["length", spec]))
    assert raised.value.field == "rewards.functions[1]"


def test_gpus_follow_the_run_unless_told() -> None:
    assert [RewardModelReward("a").gpus_per_worker(on_gpu=on) for on in (True, False)] == [1.0, 0.0]
    assert [RewardModelReward("a", num_gpus=0.25).gpus_per_worker(on_gpu=on) for on in (True, False)] == [0.25, 0.25]


def test_it_is_a_function_of_this_process_too(model_path: str) -> None:
    reward = RewardModelReward(model_path, dtype="float32")
    texts = reward(prompts=["1+1=", "2+2="], completions=["2", "five"], completion_ids=[[1], [1]], answer=["2", "4"])
    chat = [{"role": "user", "content": "1+1="}]
    (of_chat,) = reward(prompts=[chat], completions=[[{"role": "assistant", "content": "2"}]])
    assert len(texts) == 2
    assert texts[0] != texts[1]
    assert of_chat == pytest.approx(texts[0], abs=1e-5)
