"""Weights that a real vLLM engine, on CPUs, is given through shared memory."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Qwen3MoeConfig

from rlhf_ray.learner.checkpoint_format import CheckpointFormat
from rlhf_ray.quickstart import model_path
from rlhf_ray.rollouts.engine import RolloutEngine
from rlhf_ray.rollouts.engine_spec import engine_spec
from rlhf_ray.settings import EvaluationSettings, ModelSettings, RolloutSettings
from rlhf_ray.types import Prompt, SamplingSettings
from rlhf_ray.weight_sync.buckets import ByteArray, gather_buckets
from rlhf_ray.weight_sync.manifest import WeightManifest

pytestmark = pytest.mark.engine


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    """A model of experts, which memory, checkpoints and kernels each hold in a form of their own."""
    torch.manual_seed(0)
    dense = AutoConfig.from_pretrained(model_path())
    tokens = {"vocab_size": dense.vocab_size, "eos_token_id": dense.eos_token_id, "pad_token_id": dense.pad_token_id}
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    # Kernels want multiples of 32: these are padded.
    of_experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    config = Qwen3MoeConfig(num_key_value_heads=1, head_dim=32, **tokens, **sizes, **of_experts)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_path()).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """A model whose output layer is the embedding, in vLLM too, where it has no name of its own."""
    torch.manual_seed(0)
    dense = AutoConfig.from_pretrained(model_path())
    tokens = {"vocab_size": dense.vocab_size, "eos_token_id": dense.eos_token_id, "pad_token_id": dense.pad_token_id}
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    heads = {"num_key_value_heads": 1, "head_dim": 32, "query_pre_attn_scalar": 32, "max_position_embeddings": 64}
    config = Gemma2Config(bos_token_id=None, tie_word_embeddings=True, **tokens, **sizes, **heads)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_path()).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("transfer", "kind"), [("shared_memory", "experts"), ("nccl", "tied")])
def test_an_engine_is_given_weights(
    transfer: str, kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With NCCL a replica that starts late gets its first weights so, before anything was sent to it."""
    path = str(request.getfixturevalue(kind))
    spec = engine_spec(
        ModelSettings(),
        RolloutSettings(max_new_tokens=8, weight_transfer=transfer),
        EvaluationSettings(),
        config=AutoConfig.from_pretrained(path),
        on_gpu=False,
        learners_on_gpu=False,
        model_path=path,
        tokenizer_path=path,
        prompt_tokens=8,
        groups_in_flight=1,
        seed=0,
        dtype="float32",
    )
    assert spec.weight_transfer == transfer
    for name, value in spec.env.items():
        monkeypatch.setenv(name, value)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    async def test() -> None:
        engine = RolloutEngine(spec)
        try:
            await engine.start(version=0)
            before = await written(engine, model)
            scale(model, 0.5)
            await engine.load_weights(*publication(model, 3))
            halved = await written(engine, model)
            scale(model, 2.0)
            await engine.load_weights(*publication(model, 4))
            after = await written(engine, model)
            assert engine.version == 4
        finally:
            engine.shutdown()
        np.testing.assert_array_equal(before, after)
        assert np.abs(before[:1] - halved[:1]).max() > 1e-3

    asyncio.run(test())


@torch.no_grad()
def scale(model: Any, factor: float) -> None:
    """Multiply every weight by a power of two, so that another call takes it back exactly."""
    for parameter in model.parameters():
        parameter.mul_(factor)


async def written(engine: RolloutEngine, model: Any) -> np.ndarray:
    """Log-probabilities of a completion, which the model in transformers agrees with."""
    ids = [17, 11, 18]
    prompt = Prompt(prompt_id=0, token_ids=np.asarray(ids, dtype=np.int32), text="", columns={})
    sampling = SamplingSettings(group_size=1, max_new_tokens=8, temperature=1.0)
    (completion,) = await engine.generate(prompt, sampling, seed=0)
    assert {span.version for span in completion.version_spans} == {engine.version}
    tokens = torch.tensor(completion.token_ids, dtype=torch.int64)
    logits = model(torch.cat([torch.tensor(ids), tokens])[None]).logits[0, len(ids) - 1 : -1]
    wanted = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    np.testing.assert_allclose(completion.sampling_logprobs, wanted.detach().numpy(), atol=1e-4)
    return completion.sampling_logprobs


def publication(model: Any, version: int) -> tuple[WeightManifest, list[list[ByteArray]]]:
    layouts, buckets = [], []
    parameters = dict(model.named_parameters(remove_duplicate=False))
    form = CheckpointFormat(model, {name: tuple(parameter.shape) for name, parameter in parameters.items()})
    for layout, pieces in gather_buckets(form.tensors(parameters.items()), dtype=torch.float32, keep=True):
        assert pieces is not None
        layouts.append(layout)
        buckets.append(pieces)
    return WeightManifest(version=version, publication=f"{version}", buckets=tuple(layouts)), buckets
