from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from rlhf_ray.errors import ConfigError
from rlhf_ray.learner import models as module
from rlhf_ray.learner.models import attention_kernel, load_critic, load_policy, shard

OPTIONS: dict[str, Any] = {"attn_implementation": "sdpa", "trust_remote_code": False}


def changed_copy(folder: Path, target: Path, *, drop: str = "", **added: torch.Tensor) -> str:
    """A model folder with one weight less, or others."""
    target.mkdir()
    for name in ("config.json", "generation_config.json"):
        if (folder / name).exists():
            (target / name).write_text((folder / name).read_text())
    weights = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if name != drop}
    save_file(weights | {name.replace("__", "."): t for name, t in added.items()}, target / "model.safetensors")
    return str(target)


@pytest.mark.parametrize(
    ("setting", "device", "kernel"),
    [("auto", "cpu", "sdpa"), ("eager", "cpu", "eager"), ("flash_attention_2", "cuda", "flash_attention_2")],
)
def test_attention_kernel(setting: str, device: str, kernel: str) -> None:
    assert attention_kernel(setting, torch.device(device)) == kernel


def test_policy_is_loaded_in_float32_in_training_mode_without_dropout(models: Path) -> None:
    policy = load_policy(str(models / "policy"), **OPTIONS)

    assert policy.training
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    assert [layer.self_attn.attention_dropout for layer in policy.model.layers] == [0.0, 0.0]
    assert policy.config.attention_dropout == 0.5, "the configuration that an export writes stays as it was"


def test_a_half_precision_checkpoint_is_trained_in_float32(models: Path, tmp_path: Path) -> None:
    weights = {name: tensor.bfloat16() for name, tensor in load_file(models / "policy/model.safetensors").items()}
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((models / "policy/config.json").read_text()) | {"dtype": "bfloat16"})
    )
    save_file(weights, tmp_path / "model.safetensors")

    policy = load_policy(str(tmp_path), **OPTIONS)

    assert policy.model.norm.weight.dtype == torch.float32


def test_a_critic_made_from_a_policy_starts_with_a_head_of_zeros(models: Path) -> None:
    critic = load_critic(str(models / "policy"), **OPTIONS)
    values = critic(input_ids=torch.tensor([[5, 6, 7]])).logits

    assert values.shape == (1, 3, 1)
    assert not values.any()
    policy_weights = load_file(models / "policy/model.safetensors")
    assert torch.equal(critic.model.embed_tokens.weight, policy_weights["model.embed_tokens.weight"])


def test_the_head_of_a_critic_is_kept(models: Path) -> None:
    saved = load_file(models / "critic/model.safetensors")
    critic = load_critic(str(models / "critic"), **OPTIONS)

    assert saved["score.weight"].any()
    assert torch.equal(critic.score.weight, saved["score.weight"])
    assert torch.equal(critic.score.bias, saved["score.bias"])


def test_the_head_of_a_reward_model_is_kept_and_its_missing_bias_is_zero(models: Path, tmp_path: Path) -> None:
    """A sequence classification head has a weight and no bias."""
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    config = Qwen2Config.from_pretrained(models / "critic")
    reward_model = Qwen2ForSequenceClassification(config)
    reward_model.save_pretrained(tmp_path)

    critic = load_critic(str(tmp_path), **OPTIONS)

    assert torch.equal(critic.score.weight, reward_model.score.weight)
    assert critic.score.bias.tolist() == [0.0]


def test_a_head_of_several_numbers_is_refused(models: Path, tmp_path: Path) -> None:
    head = {"score__weight": torch.ones(2, 32), "score__bias": torch.ones(2)}
    path = changed_copy(models / "policy", tmp_path / "classifier", **head)

    with pytest.raises(ConfigError, match="score") as caught:
        load_critic(path, **OPTIONS)
    assert (caught.value.field, caught.value.value) == ("model.critic_path", path)


@pytest.mark.parametrize(
    ("load", "field"), [(load_policy, "model.path"), (load_critic, "model.critic_path")], ids=["policy", "critic"]
)
def test_a_checkpoint_that_lacks_weights_is_refused(load: Any, field: str, models: Path, tmp_path: Path) -> None:
    missing = "model.layers.1.mlp.up_proj.weight"
    path = changed_copy(models / "policy", tmp_path / "torn", drop=missing)

    with pytest.raises(ConfigError, match=missing.replace(".", r"\.")) as caught:
        load(path, **OPTIONS)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("load", "field"), [(load_policy, "model.path"), (load_critic, "model.critic_path")], ids=["policy", "critic"]
)
def test_a_folder_that_is_no_model_is_refused(load: Any, field: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be loaded") as caught:
        load(str(tmp_path), **OPTIONS)
    assert (caught.value.field, caught.value.value) == (field, str(tmp_path))


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_each_decoder_layer_is_a_shard_of_its_own_and_weights_stay_float32(
    compute_dtype: torch.dtype, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MIN_UNIT_PARAMETERS", 1)
    policy = load_policy(str(models / "policy"), **OPTIONS)
    policy = shard(policy, init_device_mesh("cpu", (1,)), compute_dtype=compute_dtype)

    units = [name for name, part in policy.named_modules() if isinstance(part, FSDPModule)]
    assert units == ["", "model.layers.0", "model.layers.1"]
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    logits = policy(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False).logits
    assert logits.dtype == compute_dtype


@pytest.mark.usefixtures("one_rank")
def test_tiny_layers_share_a_shard(models: Path) -> None:
    policy = load_policy(str(models / "policy"), **OPTIONS)
    policy = shard(policy, init_device_mesh("cpu", (1,)), compute_dtype=torch.float32)
    assert [name for name, part in policy.named_modules() if isinstance(part, FSDPModule)] == [""]
