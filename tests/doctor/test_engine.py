from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.doctor import engine
from rlhf_ray.doctor.check import Check
from rlhf_ray.doctor.child import ChildFailure
from rlhf_ray.rollouts.engine import EngineSpec

SPEC = EngineSpec(
    engine_args={"model": "somewhere"},
    env={"TORCHDYNAMO_DISABLE": "1"},
    eos_token_ids=(0,),
    weight_transfer="shared_memory",
    tensor_parallel_size=1,
    on_gpu=False,
)


def answered(monkeypatch: pytest.MonkeyPatch, **found: Any) -> Check:
    def child(module: str, spec: EngineSpec, *, timeout_s: float, env: dict[str, str]) -> dict[str, Any]:
        assert (module, spec, timeout_s, env) == ("rlhf_ray.doctor.engine", SPEC, 60.0, SPEC.env)
        return {"startup_s": 24.6, "generate_s": 0.25, "num_tokens": 8, "finite": True} | found

    monkeypatch.setattr(engine, "run_child", child)
    return engine.check_engine(SPEC, timeout_s=60.0)


def test_an_engine_that_writes_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    check = answered(monkeypatch)
    assert check.status == "ok"
    assert check.detail == "started in 25 s, wrote 8 tokens in 0.2 s"


@pytest.mark.parametrize("found", [{"num_tokens": 3}, {"finite": False}])
def test_an_engine_that_writes_nonsense_is_not(monkeypatch: pytest.MonkeyPatch, found: dict[str, Any]) -> None:
    assert answered(monkeypatch, **found).status == "fail"


def test_an_engine_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def child(*_: Any, **__: Any) -> dict[str, Any]:
        raise ChildFailure("ValueError: head size 7", Path("log.txt"))

    monkeypatch.setattr(engine, "run_child", child)
    check = engine.check_engine(SPEC, timeout_s=60.0)
    assert (check.status, check.detail) == ("fail", "ValueError: head size 7")
    assert "log.txt" in check.remedy
