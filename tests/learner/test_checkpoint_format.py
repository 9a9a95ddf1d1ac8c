"""Models that memory holds in another form than checkpoints: experts in one tensor, renamed layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming

from rlhf_ray.learner.checkpoint_format import CheckpointFormat
from rlhf_ray.learner.models import load_policy

SMALL: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "mixtral": MixtralConfig(**SMALL, num_local_experts=3),
    "qwen3_moe": Qwen3MoeConfig(**SMALL, moe_intermediate_size=6, num_experts=3, num_experts_per_tok=2),
    "deepseek_v3": DeepseekV3Config(
        **SMALL | {"head_dim": 2},
        moe_intermediate_size=6,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=4,
        q_lora_rank=4,
        qk_rope_head_dim=2,
        qk_nope_head_dim=2,
        v_head_dim=4,
    ),
    "dense, tied": Qwen2Config(**SMALL, tie_word_embeddings=True),
}


@pytest.fixture(params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint as transformers writes it."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[request.param]).save_pretrained(tmp_path)
    return tmp_path


def test_a_checkpoint_comes_back_as_it_was(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    model = load_policy(str(folder), kernels=("eager",), trust_remote_code=False)

    form = CheckpointFormat(model)

    # Whatever becomes of the model: publications share this format.
    for _ in range(2):
        found = dict(form.tensors(every_name=False)) | form.buffers()

        assert found.keys() == stored.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())


def test_shapes_are_those_of_the_tensors_in_their_order(folder: Path) -> None:
    model = load_policy(str(folder), kernels=("eager",), trust_remote_code=False)
    form = CheckpointFormat(model)

    assert [(name, tuple(tensor.shape)) for name, tensor in form.tensors()] == form.shapes


def test_parameters_that_are_stored_as_they_are_stay_what_they_are(folder: Path) -> None:
    # A sharded one must not be gathered for its name.
    model = load_policy(str(folder), kernels=("eager",), trust_remote_code=False)
    parameters = {id(parameter) for parameter in model.parameters()}

    converted = [name for name, t in CheckpointFormat(model).tensors(every_name=False) if id(t) not in parameters]

    assert all(".experts." in name for name in converted)


class Halves(nn.Module):
    """A layer that a checkpoint stores as one matrix, between others, and memory as two."""

    def __init__(self) -> None:
        super().__init__()
        self.config = PretrainedConfig()
        self.up = nn.Linear(2, 3, bias=False)
        self.norm = nn.LayerNorm(2)
        self.gate = nn.Linear(2, 3, bias=False)
        self._weight_conversions = [
            WeightConverter("both.weight", ["gate.weight", "up.weight"], [Chunk(dim=0)]),
            WeightRenaming("layernorm", "norm"),
        ]


def test_what_is_stored_together_is_put_together() -> None:
    model = Halves()

    found = dict(CheckpointFormat(model).tensors(every_name=False))

    assert list(found) == ["layernorm.weight", "layernorm.bias", "both.weight"]
    assert found["layernorm.weight"] is model.norm.weight
    assert torch.equal(found["both.weight"], torch.cat([model.gate.weight, model.up.weight]))


class InStep(WeightConverter):  # type: ignore[misc]
    """One whose operation wants all that it takes at once."""

    def convert(self, layer_name: str, **kwargs: Any) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = super().convert(layer_name, **kwargs)
        if found[layer_name].shape[0] != 6:
            raise KeyError(layer_name)
        return found

    def reverse_transform(self) -> InStep:
        return InStep(self.target_patterns, self.source_patterns, [op.reverse_op for op in self.operations])


def test_an_operation_that_wants_all_at_once_gets_them() -> None:
    model = Halves()
    model._weight_conversions[0] = InStep("both.weight", ["gate.weight", "up.weight"], [Chunk(dim=0)])

    found = dict(CheckpointFormat(model).tensors(every_name=False))

    assert torch.equal(found["both.weight"], torch.cat([model.gate.weight, model.up.weight]))
