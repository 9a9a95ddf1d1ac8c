from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_ray import RewardModelReward, quickstart
from rlhf_ray.errors import ConfigError
from rlhf_ray.rewards.reward_model.check import check_reward_model

FIELD = "rewards.functions[0]"


def test_a_usable_model_passes(model_path: str) -> None:
    check_reward_model(RewardModelReward(model_path, as_chat=True, max_length=256), FIELD)


@pytest.mark.parametrize(("path", "message"), [("./missing", "no such folder"), ("/no/such/model", "no such folder")])
def test_a_missing_path(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        check_reward_model(RewardModelReward(path), FIELD)
    assert (raised.value.field, raised.value.value) == (FIELD, path)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no model folder or reachable hub id"):
        check_reward_model(RewardModelReward(str(tmp_path)), FIELD)


def test_a_quantized_model_is_refused(make: Callable[..., str]) -> None:
    path = make()
    config = Path(path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ConfigError, match=r"its weights are quantized \(fp8\)") as caught:
        check_reward_model(RewardModelReward(path), FIELD)
    assert (caught.value.field, caught.value.value) == (FIELD, path)


def test_a_language_model_is_no_reward_model() -> None:
    with pytest.raises(ConfigError, match="this is a Qwen2ForCausalLM, which has no classification head"):
        check_reward_model(RewardModelReward(quickstart.model_path()), FIELD)


def test_a_tokenizer_that_is_not_there(make: Callable[..., str]) -> None:
    path = make()
    for file in Path(path).glob("tokenizer*"):
        file.unlink()
    with pytest.raises(
        ConfigError, match=r"tokenizer cannot be loaded: the folder holds no tokenizer .* tokenizer_path"
    ):
        check_reward_model(RewardModelReward(path), FIELD)
    check_reward_model(RewardModelReward(path, tokenizer_path=quickstart.model_path()), FIELD)


def test_a_model_of_several_labels_needs_one_named(make: Callable[..., str]) -> None:
    path = make(num_labels=3)
    config = Path(path) / "config.json"
    values = json.loads(config.read_text())
    names = {"0": "bad", "1": "fair", "2": "good"}
    config.write_text(json.dumps(values | {"id2label": names, "label2id": {v: int(k) for k, v in names.items()}}))
    for label in ("good", 2, 0):
        check_reward_model(RewardModelReward(path, label=label), FIELD)
    for wrong in (None, "great", 3, -1):
        with pytest.raises(ConfigError, match=r"0 \(bad\), 1 \(fair\), 2 \(good\)") as raised:
            check_reward_model(RewardModelReward(path, label=wrong), FIELD)
        assert raised.value.field == f"{FIELD}.label"


def test_settings_that_do_not_go_with_the_model(make: Callable[..., str]) -> None:
    path = make(chat_template=False, max_positions=64)
    with pytest.raises(ConfigError, match="no chat template"):
        check_reward_model(RewardModelReward(path, as_chat=True), FIELD)
    with pytest.raises(ConfigError, match="use at most 64"):
        check_reward_model(RewardModelReward(path, max_length=65), FIELD)
