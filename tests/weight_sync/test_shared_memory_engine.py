"""Weights that a real vLLM engine, on CPUs, is given through shared memory."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_ray.quickstart import model_path
from rlhf_ray.rollouts.engine import RolloutEngine
from rlhf_ray.rollouts.engine_spec import engine_spec
from rlhf_ray.settings import EvaluationSettings, ModelSettings, RolloutSettings
from rlhf_ray.types import Prompt, SamplingSettings
from rlhf_ray.weight_sync.buckets import ByteArray, gather_buckets
from rlhf_ray.weight_sync.manifest import WeightManifest

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("transfer", [pytest.param("shared_memory", marks=pytest.mark.slow), "nccl"])
def test_an_engine_is_given_weights(transfer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With NCCL a replica that starts late gets its first weights so, before anything was sent to it."""
    path = str(model_path())
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
    own = dict(model.state_dict())
    others = {name: value * 0.5 for name, value in own.items()}

    async def test() -> None:
        engine = RolloutEngine(spec)
        try:
            await engine.start(version=0)
            before = await written(engine)
            await engine.load_weights(*publication(others, 3))
            halved = await written(engine)
            await engine.load_weights(*publication(own, 4))
            after = await written(engine)
            assert engine.version == 4
        finally:
            engine.shutdown()
        np.testing.assert_array_equal(before, after)
        assert np.abs(before[:1] - halved[:1]).max() > 1e-3

    asyncio.run(test())


async def written(engine: RolloutEngine) -> np.ndarray:
    """Log-probabilities of a greedy completion."""
    prompt = Prompt(prompt_id=0, token_ids=np.asarray([17, 11, 18], dtype=np.int32), text="", columns={})
    sampling = SamplingSettings(group_size=1, max_new_tokens=8, temperature=0.0)
    (completion,) = await engine.generate(prompt, sampling, seed=0)
    assert {span.version for span in completion.version_spans} == {engine.version}
    return completion.sampling_logprobs


def publication(weights: dict[str, torch.Tensor], version: int) -> tuple[WeightManifest, list[list[ByteArray]]]:
    layouts, buckets = [], []
    for layout, pieces in gather_buckets(weights.items(), dtype=torch.float32, keep=True):
        assert pieces is not None
        layouts.append(layout)
        buckets.append(pieces)
    return WeightManifest(version=version, publication=f"{version}", buckets=tuple(layouts)), buckets
