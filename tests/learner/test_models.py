from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_families import tiny_config
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_ray.errors import ConfigError
from rlhf_ray.learner import models as module
from rlhf_ray.learner.models import attention_kernels, load_critic, load_policy, shard

OPTIONS: dict[str, Any] = {"kernels": ("sdpa",), "trust_remote_code": False}


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
    ("setting", "device", "dtype", "kernels"),
    [
        ("auto", "cpu", torch.bfloat16, ("sdpa", "eager")),
        ("eager", "cpu", torch.float32, ("eager",)),
        ("auto", "cuda", torch.bfloat16, ("varlen", "flash_attention_2", "sdpa", "eager")),
        ("varlen", "cpu", torch.float32, ("varlen",)),
        # Flash attention has no float32 kernel.
        ("auto", "cuda", torch.float32, ("sdpa", "eager")),
        ("flash_attention_2", "cuda", torch.bfloat16, ("flash_attention_2",)),
    ],
)
def test_attention_kernels(
    setting: str, device: str, dtype: torch.dtype, kernels: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(module, "flash_kernel", lambda: print)
    assert attention_kernels(setting, torch.device(device), dtype) == kernels


def test_gpus_need_no_package_to_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for capability, kernels in (((8, 0), ("varlen", "sdpa", "eager")), ((7, 5), ("sdpa", "eager"))):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda found=capability: found)
        assert attention_kernels("auto", torch.device("cuda"), torch.bfloat16) == kernels


@pytest.mark.parametrize("family, kernel", [("qwen2", "varlen"), ("gemma2", "eager"), ("gpt_oss", "eager")])
@pytest.mark.parametrize("load", [load_policy, load_critic])
def test_soft_caps_and_sinks_are_never_dropped(load: Any, family: str, kernel: str, tmp_path: Path) -> None:
    """SDPA reads neither; transformers says so of sinks alone."""
    AutoModelForCausalLM.from_config(tiny_config(family)).save_pretrained(tmp_path)

    model = load(str(tmp_path), kernels=("varlen", "sdpa", "eager"), trust_remote_code=False)

    assert model.config._attn_implementation == kernel
    if kernel == "eager":
        with pytest.raises(ConfigError, match=f"the {family} family does not have it") as caught:
            load(str(tmp_path), kernels=("sdpa",), trust_remote_code=False)
        assert caught.value.field == "model.attn_implementation"


@pytest.mark.parametrize("kernel", ["flash_attention_3", "no_such_kernel"])
def test_a_kernel_that_cannot_be_loaded_is_named(models: Path, kernel: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.attn_implementation.*qwen2 family does not have it"):
        load_policy(str(models / "policy"), kernels=(kernel,), trust_remote_code=False)


def test_a_model_without_the_first_kernel_is_loaded_with_the_next(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Qwen2ForCausalLM

    monkeypatch.setattr(Qwen2ForCausalLM, "_supports_sdpa", False)
    policy = load_policy(str(models / "policy"), kernels=("sdpa", "eager"), trust_remote_code=False)
    assert policy.config._attn_implementation == "eager"
    with pytest.raises(ConfigError, match="does not support an attention implementation"):
        load_policy(str(models / "policy"), kernels=("sdpa",), trust_remote_code=False)


def test_policy_is_loaded_in_float32_in_evaluation_mode(models: Path) -> None:
    policy = load_policy(str(models / "policy"), **OPTIONS)

    assert not any(part.training for part in policy.modules())
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    assert policy.config.attention_dropout == 0.5, "the configuration that an export writes stays as it was"


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_nothing_is_drawn_in_a_forward_pass(gradient_checkpointing: bool, tmp_path: Path) -> None:
    """OPT's decoder layers have their dropout as a number, and are what gradient checkpointing recomputes."""
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
    OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=16, dropout=0.5)).save_pretrained(tmp_path)
    policy = shard(
        load_policy(str(tmp_path), **OPTIONS),
        init_device_mesh("cpu", (1,)),
        compute_dtype=torch.float32,
        gradient_checkpointing=gradient_checkpointing,
    )
    recomputed: list[Any] = []
    monitored = policy.model.decoder.layers[0].fc1.register_forward_hook(lambda *_: recomputed.append(1))
    ids = torch.tensor([[5, 6, 7, 8]])
    first, second = (policy(input_ids=ids, use_cache=False).logits for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    second.sum().backward()
    monitored.remove()

    assert len(recomputed) == (3 if gradient_checkpointing else 2)


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


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize(
    ("load", "field"), [(load_policy, "model.path"), (load_critic, "model.critic_path")], ids=["policy", "critic"]
)
def test_a_checkpoint_with_weights_that_are_not_finite_is_refused(
    load: Any, field: str, value: float, models: Path, tmp_path: Path
) -> None:
    norm = torch.ones(32)
    norm[5] = value
    path = changed_copy(models / "policy", tmp_path / "damaged", model__norm__weight=norm)

    with pytest.raises(ConfigError, match=r"its model\.norm\.weight holds numbers that are not") as caught:
        load(path, **OPTIONS)
    assert (caught.value.field, caught.value.value) == (field, path)


def test_a_checkpoint_with_a_buffer_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    """A bias of a router is no parameter, and is published all the same."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_experts_per_tok": 2}
    sizes |= {"n_routed_experts": 4, "first_k_dense_replace": 0, "vocab_size": 40}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("glm4_moe", **sizes))
    name = "model.layers.0.mlp.gate.e_score_correction_bias"
    model.get_buffer(name)[1] = float("nan")
    model.save_pretrained(tmp_path)

    with pytest.raises(ConfigError, match=rf"its {name} holds numbers that are not finite"):
        load_policy(str(tmp_path), **OPTIONS)


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
def test_a_model_that_cannot_recompute_activations_is_a_wrong_setting() -> None:
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(n_embd=8, n_layer=1, n_head=2, vocab_size=10))
    mesh = init_device_mesh("cpu", (1,))
    with pytest.raises(ConfigError, match=r"learners\.gradient_checkpointing = True: OpenAIGPT.* use false"):
        shard(model, mesh, compute_dtype=torch.float32, gradient_checkpointing=True)


@pytest.mark.usefixtures("one_rank")
def test_tiny_layers_share_a_shard(models: Path) -> None:
    policy = load_policy(str(models / "policy"), **OPTIONS)
    policy = shard(policy, init_device_mesh("cpu", (1,)), compute_dtype=torch.float32)
    assert [name for name, part in policy.named_modules() if isinstance(part, FSDPModule)] == [""]
