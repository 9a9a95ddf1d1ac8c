"""Weights that a real vLLM engine, on CPUs, is given through shared memory."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlhf_ray.config.settings import DataSettings, RolloutSettings, Settings
from rlhf_ray.learner.checkpoint_format import CheckpointFormat
from rlhf_ray.quickstart import model_path
from rlhf_ray.rollouts.engine import EngineSpec, RolloutEngine
from rlhf_ray.rollouts.engine_spec import engine_spec
from rlhf_ray.types import Device, Prompt, SamplingSettings, Trajectory
from rlhf_ray.weight_sync.buckets import ByteArray, gather_buckets
from rlhf_ray.weight_sync.manifest import WeightManifest, joined_names

pytestmark = pytest.mark.engine


SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "max_position_embeddings": 64}
HEADS = SIZES | {"head_dim": 32}
OF_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
KINDS: dict[str, dict[str, int]] = {
    # Experts, which memory, checkpoints and kernels each hold in a form of their own; kernels pad them to 64.
    "qwen3_moe": HEADS | OF_EXPERTS | {"moe_intermediate_size": 48},
    # An output layer that is the embedding, in vLLM too, where it has no name of its own.
    "gemma2": HEADS | {"query_pre_attn_scalar": 32},
    "gemma3_text": HEADS | {"query_pre_attn_scalar": 32},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gpt_neox": {name: size for name, size in SIZES.items() if name != "num_key_value_heads"},
    "granite": SIZES,
    "llama": HEADS,
    "mixtral": HEADS | {"num_local_experts": 4},
    "olmoe": SIZES | OF_EXPERTS,
    "phi3": SIZES,
    "qwen2_moe": HEADS | OF_EXPERTS | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    "qwen3": HEADS,
}
IN_EVERY_RUN = ("qwen3_moe", "gemma2")
PROMPT = [17, 11, 18]


@pytest.mark.parametrize(
    ("kind", "transfer"),
    [
        ("qwen3_moe", "shared_memory"),
        # With NCCL a replica that starts late gets its first weights so, before anything was sent to it.
        ("gemma2", "nccl"),
        *(pytest.param(kind, "shared_memory", marks=pytest.mark.slow) for kind in KINDS if kind not in IN_EVERY_RUN),
    ],
)
def test_an_engine_is_given_weights(kind: str, transfer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(saved_model(kind, tmp_path))
    spec = spec_of(path, RolloutSettings(max_new_tokens=8))
    # Without GPUs no run asks for NCCL; its engine also loads from shared memory, for replicas that start late.
    backend = {"weight_transfer_config": {"backend": f"rlhf_ray_{transfer}"}}
    spec = replace(spec, weight_transfer=transfer, engine_args=spec.engine_args | backend)
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


@pytest.mark.slow
@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="vLLM's CPU kernels of fp8 need AMX")
def test_a_quantized_engine_rounds_the_weights_that_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(saved_model("quantized", tmp_path))
    spec = spec_of(path, RolloutSettings(max_new_tokens=8, quantization="fp8_per_block"))
    for name, value in spec.env.items():
        monkeypatch.setenv(name, value)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    other = AutoModelForCausalLM.from_config(model.config)

    async def sampled(*published: Any) -> np.ndarray:
        engine = RolloutEngine(spec)
        try:
            await engine.start(version=0)
            for version, weights in enumerate(published):
                await engine.load_weights(*publication(weights, version))
            return (await completion_of(engine)).sampling_logprobs
        finally:
            engine.shutdown()

    async def test() -> None:
        fresh, back, elsewhere = await sampled(), await sampled(other, model), await sampled(other)
        # Bit for bit what an engine is that starts with them.
        np.testing.assert_array_equal(back, fresh)
        assert np.abs(elsewhere[:1] - fresh[:1]).max() > 1e-3

    asyncio.run(test())


def spec_of(path: str, rollouts: RolloutSettings) -> EngineSpec:
    config = AutoConfig.from_pretrained(path)
    return engine_spec(
        replace(Settings(), rollouts=rollouts, data=DataSettings(batch_size=1)),
        Device(on_gpu=False, learners_on_gpu=False, colocated=False, dtype="float32"),
        model_path=path,
        tokenizer_path=path,
        config=config,
        eos_token_ids=(config.eos_token_id,),
        prompt_tokens=8,
    )


def saved_model(kind: str, folder: Path) -> Path:
    """A small model with random weights and the quickstart's tokenizer."""
    torch.manual_seed(0)
    quickstart = AutoConfig.from_pretrained(model_path())
    tokens = {name: getattr(quickstart, name) for name in ("vocab_size", "eos_token_id", "pad_token_id")}
    sizes = KINDS.get(kind, HEADS | {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64})
    kind = kind if kind in KINDS else "llama"
    config = AutoConfig.for_model(kind, bos_token_id=None, **tokens, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_path()).save_pretrained(folder)
    return folder


@torch.no_grad()
def scale(model: Any, factor: float) -> None:
    """Multiply every weight by a power of two, so that another call takes it back exactly."""
    for parameter in model.parameters():
        parameter.mul_(factor)


async def completion_of(engine: RolloutEngine) -> Trajectory:
    prompt = Prompt(prompt_id=0, token_ids=np.asarray(PROMPT, dtype=np.int32), text="", columns={})
    (completion,) = await engine.generate(
        prompt, SamplingSettings(group_size=1, max_new_tokens=8, temperature=1.0), seed=0
    )
    return completion


async def written(engine: RolloutEngine, model: Any) -> np.ndarray:
    """Log-probabilities of a completion, which the model in transformers agrees with."""
    completion = await completion_of(engine)
    assert {span.version for span in completion.version_spans} == {engine.version}
    tokens = torch.tensor(completion.token_ids, dtype=torch.int64)
    logits = model(torch.cat([torch.tensor(PROMPT), tokens])[None]).logits[0, len(PROMPT) - 1 : -1]
    wanted = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    np.testing.assert_allclose(completion.sampling_logprobs, wanted.detach().numpy(), atol=1e-4)
    return completion.sampling_logprobs


def publication(model: Any, version: int) -> tuple[WeightManifest, list[list[ByteArray]]]:
    layouts, buckets = [], []
    for layout, pieces in gather_buckets(CheckpointFormat(model).tensors(), dtype=torch.float32, keep=True):
        assert pieces is not None
        layouts.append(layout)
        buckets.append(pieces)
    manifest = WeightManifest(version=version, publication=f"{version}", buckets=tuple(layouts))
    # Each weight once, whatever it is tied to.
    sent = sum(tensor.size_bytes for layout in layouts for tensor in layout.tensors)
    assert sent == 4 * sum(parameter.numel() for parameter in model.parameters())
    return manifest, buckets


class Tied(nn.Module):  # type: ignore[misc]
    """What vLLM's models have: an embedding, and an output layer with its weight, one of its own, or none."""

    def __init__(self, output: str) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(3, 2)
        if output != "none":
            self.lm_head = nn.Linear(2, 3, bias=False)
        if output == "tied":
            self.lm_head.weight = self.embed_tokens.weight
        if output != "none":
            self.lm_head.weight.weight_loader = lambda parameter, tensor: self.filled.append(tensor)
        self.filled: list[Any] = []
        self.loaded: list[str] = []

    def load_weights(self, weights: Any) -> None:
        self.loaded += [name for name, _ in weights]


@pytest.mark.parametrize(
    ("output", "loaded", "filled"),
    [
        ("tied", ["model.embed_tokens.weight", "norm.weight"], 1),
        ("own", ["model.embed_tokens.weight", "lm_head.weight", "norm.weight"], 0),
        ("none", ["model.embed_tokens.weight", "norm.weight"], 0),
    ],
)
def test_a_weight_that_is_sent_once_is_loaded_under_each_of_its_names(
    output: str, loaded: list[str], filled: int
) -> None:
    from rlhf_ray.weight_sync.shared_memory_engine import _load_tied_weights

    model, tensor = Tied(output), torch.ones(3, 2)
    _load_tied_weights(model)
    model.load_weights([(joined_names(["model.embed_tokens.weight", "lm_head.weight"]), tensor), ("norm.weight", 0)])

    assert model.loaded == loaded
    assert [found is tensor for found in model.filled] == [True] * filled


def test_constants_outlive_a_reload() -> None:
    from rlhf_ray.weight_sync.shared_memory_engine import _Constants

    class UnquantizedMethod:
        """Named as vLLM's are."""

    model = nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(3)))
    # In a quantized model too, but for the layers that are quantized.
    model[1].quant_method, model[2].quant_method = UnquantizedMethod(), object()
    for layer in model:
        layer.running_mean.fill_(7.0)
    constants = _Constants(model)
    for layer in model:
        layer.running_mean = torch.full((2,), torch.nan)

    constants.put_back()

    assert [layer.running_mean.tolist() == [7.0, 7.0] for layer in model] == [True, True, False]
