from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rlhf_ray.errors import ConfigError
from rlhf_ray.rollouts.engine import EngineSpec, RolloutEngine, _completion
from rlhf_ray.types import VersionSpan


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
