from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rlhf_ray.errors import ConfigError
from rlhf_ray.rollouts.engine import EngineSpec, RolloutEngine, _completion
from rlhf_ray.types import VersionSpan


@pytest.mark.parametrize(
    ("gpu", "gib", "served", "taken"),
    [("NVIDIA H100", 80, 8192, 16384), ("NVIDIA A100", 80, 2048, 8192), ("NVIDIA B200", 180, 16384, 16384)],
)
@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 3000}])
def test_an_engine_on_a_gpu_takes_as_many_tokens_per_step_as_a_server_or_more(
    gpu: str, gib: int, served: int, taken: int, options: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import AsyncEngineArgs
    from vllm.engine import arg_utils
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    def budget(arguments: AsyncEngineArgs, context: UsageContext) -> int | None:
        model = SimpleNamespace(max_model_len=32768, is_multimodal_model=False)
        parallel = SimpleNamespace(use_batched_dp_moe=False)
        arguments.enable_chunked_prefill = True
        arguments._set_default_max_num_seqs_and_batched_tokens_args(context, model, parallel)
        return arguments.max_num_batched_tokens

    def start(arguments: AsyncEngineArgs, usage_context: UsageContext = UsageContext.ENGINE_CONTEXT) -> Any:
        return SimpleNamespace(budget=budget(arguments, usage_context))

    card = SimpleNamespace(
        get_device_total_memory=lambda: gib * 1024**3,
        get_device_name=lambda: gpu,
        is_tpu=lambda: False,
        is_cpu=lambda: False,
    )
    monkeypatch.setattr(arg_utils, "current_platform", card)
    monkeypatch.setattr(AsyncLLM, "from_engine_args", start)
    arguments = {"model": "m", "max_num_seqs": 64, **options}
    spec = EngineSpec(
        engine_args=arguments, env={}, eos_token_ids=(), weight_transfer="nccl", tensor_parallel_size=1, on_gpu=True
    )
    engine: Any = RolloutEngine(spec)._engine
    assert budget(AsyncEngineArgs(model="m", max_num_seqs=64), UsageContext.OPENAI_API_SERVER) == served
    assert engine.budget == options.get("max_num_batched_tokens", taken) >= min(served, 3000)


def choice(**overrides: Any) -> SimpleNamespace:
    """What vLLM says of one completion."""
    said = {
        "token_ids": [5, 6, 1],
        "logprobs": SimpleNamespace(logprobs=[-0.5, -1.25, -0.125]),
        "weight_versions": [SimpleNamespace(version="3", start=0, end=2), SimpleNamespace(version="4", start=2, end=3)],
        "finish_reason": "stop",
    }
    return SimpleNamespace(**said | overrides)


def test_a_completion_is_taken_over_token_by_token() -> None:
    completion = _completion(choice(), 3)

    assert completion.token_ids.tolist() == [5, 6, 1]
    assert completion.token_ids.dtype == np.int32
    assert completion.sampling_logprobs.tolist() == [-0.5, -1.25, -0.125]
    assert completion.sampling_logprobs.dtype == np.float32
    assert completion.finish_reason == "stop"
    assert not completion.truncated


def test_versions_are_numbers_again() -> None:
    assert _completion(choice(), 3).version_spans == (
        VersionSpan(version=3, start=0, end=2),
        VersionSpan(version=4, start=2, end=3),
    )


def test_a_length_limit_is_a_truncation() -> None:
    assert _completion(choice(finish_reason="length"), 3).truncated


def test_a_log_probability_that_is_missing_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="2 log-probabilities for 3 tokens"):
        _completion(choice(logprobs=SimpleNamespace(logprobs=[-0.5, -1.0])), 3)


def test_a_cpu_without_kernels_for_quantized_weights_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    spec = EngineSpec(
        engine_args={"quantization": "fp8_per_block"},
        env={},
        eos_token_ids=(1,),
        weight_transfer="shared_memory",
        tensor_parallel_size=1,
        on_gpu=False,
    )

    with pytest.raises(ConfigError, match="needs a GPU, or a CPU with AMX") as caught:
        RolloutEngine(spec)
    assert caught.value.field == "rollouts.quantization"


class Vllm:
    """What an engine asks of vLLM, in order."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.engine_core = self

    def __getattr__(self, name: str) -> Any:
        async def call(*_: Any, **options: Any) -> None:
            self.calls.append((name, options) if options else name)

        return call


def test_an_engine_that_wakes_runs_nothing_before_it_has_its_cache() -> None:
    engine = RolloutEngine.__new__(RolloutEngine)
    engine._engine = vllm = Vllm()
    engine._sleeps, engine._updates = False, 0

    async def run() -> None:
        await engine.sleep()
        await engine.wake_weights()
        await engine.begin_update()
        await engine.finish_update(3)
        await engine.wake()
        await engine.begin_update()
        await engine.finish_update(4)

    asyncio.run(run())
    assert vllm.calls == [
        # Requests in flight are kept, where vLLM would abort them; level 2 would lose buffers.
        ("sleep", {"level": 1, "mode": "keep"}),
        ("wake_up", {"tags": ["weights"]}),
        "start_weight_update",
        ("finish_weight_update", {"weight_version": "3"}),
        ("wake_up", {"tags": ["kv_cache"]}),
        ("pause_scheduler_async", {"mode": "keep", "clear_cache": False}),
        "start_weight_update",
        ("finish_weight_update", {"weight_version": "4"}),
        "resume_generation",
    ]
