from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import learner_scenarios as runs
import pytest
import torch
import torch.distributed as dist
from learner_scenarios import SCENARIOS, Scenario
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_ray.errors import ConfigError
from rlhf_ray.learner.checkpoint_format import CheckpointFormat
from rlhf_ray.learner.layout import lay_out
from rlhf_ray.learner.learner import Learner
from rlhf_ray.learner.lora import LoraSpec, add_adapters, merged_parameters
from rlhf_ray.learner.models import load_policy
from rlhf_ray.weight_sync.manifest import under_each_name

CPU = torch.device("cpu")
SPEC = LoraSpec(rank=4, alpha=8.0, targets=(), seed=5)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    runs.save_models(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def trained(models: Path) -> Learner:
    """A learner with adapters after one update."""
    learner = Learner(runs.make_spec(models, SCENARIOS["lora"]))
    runs.update(learner, SCENARIOS["lora"], 0)
    return learner


def logprobs(score: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    batch = runs.make_batch(5, seed=1)
    with torch.no_grad():
        return score(lay_out(batch, range(5), packed=False, device=CPU))[0]


def test_only_adapters_are_trained_and_they_are(models: Path, trained: Learner) -> None:
    fresh = Learner(runs.make_spec(models, SCENARIOS["lora"]))
    before = {name: p.detach().full_tensor() for name, p in fresh.policy.model.named_parameters()}
    after = {name: p.detach().full_tensor() for name, p in trained.policy.model.named_parameters()}

    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".lora_" in name}
    # Four projections of attention and three of the feed-forward part, two matrices each, in every layer.
    assert len(changed) == 14 * trained.policy.model.config.num_hidden_layers


def test_the_reference_is_the_policy_as_it_was_and_costs_no_model(models: Path, trained: Learner) -> None:
    fresh = Learner(runs.make_spec(models, Scenario()))
    assert trained._models.reference is not None
    assert trained._models.reference.model is trained.policy.model

    torch.testing.assert_close(logprobs(trained._models.reference), logprobs(fresh._models.score), atol=1e-6, rtol=0.0)
    # Switched back on afterward.
    assert float((logprobs(trained._models.score) - logprobs(trained._models.reference)).abs().max()) > 1e-4


def test_what_is_published_has_the_names_of_the_model_and_samples_what_the_policy_does(
    models: Path, trained: Learner
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(models / "policy")
    sent = under_each_name(trained.policy.checkpoint.tensors())
    published = {name: tensor.full_tensor() for name, tensor in sent}
    assert published.keys() == dict(plain.named_parameters(remove_duplicate=False)).keys()

    plain.load_state_dict(published)
    batch = runs.make_batch(5, seed=1)
    micro = lay_out(batch, range(5), packed=False, device=CPU)
    with torch.no_grad():
        logits = plain(input_ids=micro.input_ids).logits / 0.8
    tokens = micro.input_ids.flatten()[micro.value_index + 1]
    expected = torch.log_softmax(logits, -1).flatten(0, 1)[micro.value_index].gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(logprobs(trained._models.score), expected * micro.mask, atol=1e-5, rtol=0.0)


def test_an_export_is_an_ordinary_model(tmp_path: Path, trained: Learner) -> None:
    trained.export(str(tmp_path))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path)

    sent = under_each_name(trained.policy.checkpoint.tensors())
    published = {name: tensor.full_tensor() for name, tensor in sent}
    for name, parameter in exported.named_parameters():
        torch.testing.assert_close(parameter.detach(), published[name], rtol=0.0, atol=0.0)


def test_a_saved_run_goes_on(tmp_path: Path, models: Path, trained: Learner) -> None:
    trained.save(str(tmp_path)).result()
    restored = Learner(runs.make_spec(models, SCENARIOS["lora"]))
    restored.load(str(tmp_path))

    mine, theirs = (runs.without_wall_times([runs.update(x, SCENARIOS["lora"], 1)])[0] for x in (restored, trained))
    assert mine == pytest.approx(theirs, abs=1e-6)


def test_adapters_start_without_effect_and_alike_everywhere(models: Path) -> None:
    drawn = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        model = load_policy(str(models / "policy"), kernels=("sdpa",), trust_remote_code=False)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        add_adapters(model, SPEC)
        assert all(torch.equal(before[name], p) for name, p in merged_parameters(model, every_name=False))
        drawn.append({name: p.detach().clone() for name, p in model.named_parameters() if ".lora_A." in name})

    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    assert all(bool(matrix.any()) for matrix in drawn[0].values())


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt2"])
def test_other_kinds_of_layers_are_merged_too(tmp_path: Path, kind: str) -> None:
    # Experts that are one tensor get no adapters; GPT-2 has its weights the other way round.
    sizes: dict[str, dict[str, Any]] = {
        "qwen3_moe": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "moe_intermediate_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mlp_only_layers": [0],
        },
        "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    }
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=32, **sizes[kind])).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    model = load_policy(str(tmp_path), kernels=("eager",), trust_remote_code=False)
    add_adapters(model, SPEC)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)

    merged = dict(CheckpointFormat(model).tensors(every_name=False))
    save_file({name: tensor.detach().contiguous() for name, tensor in merged.items()}, tmp_path / "model.safetensors")

    assert merged.keys() == stored.keys()
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    plain = load_policy(str(tmp_path), kernels=("eager",), trust_remote_code=False)
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, model(ids).logits, atol=1e-5, rtol=0.0)
    changed = {name for name in stored if not torch.equal(stored[name], merged[name])}
    assert changed
    assert not any("experts" in name or "lm_head" in name for name in changed)
    if kind == "qwen3_moe":
        # Four projections in two layers, and the feed-forward part of the layer that has no experts.
        assert len(changed) == 11


def test_a_layer_that_is_not_there_is_named_with_those_that_are(models: Path) -> None:
    model = load_policy(str(models / "policy"), kernels=("sdpa",), trust_remote_code=False)
    with pytest.raises(ConfigError, match=r"model\.lora_targets.*k_proj, .*q_proj"):
        add_adapters(model, LoraSpec(rank=2, alpha=4.0, targets=("query",), seed=0))


def test_named_layers_alone_get_adapters(models: Path) -> None:
    model = load_policy(str(models / "policy"), kernels=("sdpa",), trust_remote_code=False)
    add_adapters(model, LoraSpec(rank=2, alpha=4.0, targets=("q_proj", "v_proj"), seed=0))

    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in model.named_parameters() if ".lora_" in name}
    assert adapted == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    ("target", "is_tied", "reason"),
    [
        # Engines tie the two again: the embedding would be sampled with the output layer's adapter.
        ("lm_head", True, "lm_head shares its weight with another layer"),
        ("embed_tokens", False, r"model\.embed_tokens is no linear layer"),
    ],
)
def test_layers_that_can_have_no_adapter_are_named(target: str, is_tied: bool, reason: str) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("qwen2", vocab_size=32, **sizes, num_key_value_heads=1, tie_word_embeddings=is_tied)
    with pytest.raises(ConfigError, match=rf"model\.lora_targets = \['q_proj', '{target}'\]: {reason}.*leave it out"):
        add_adapters(
            AutoModelForCausalLM.from_config(config), LoraSpec(rank=2, alpha=4.0, targets=("q_proj", target), seed=0)
        )


def test_an_output_layer_of_its_own_may_have_an_adapter() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("qwen2", vocab_size=32, **sizes, num_key_value_heads=1, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config)
    add_adapters(model, LoraSpec(rank=2, alpha=4.0, targets=("lm_head",), seed=0))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "lm_head.lora_A.default.weight",
        "lm_head.lora_B.default.weight",
    ]
