from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_ray.doctor import engine
from rlhf_ray.doctor.check import Check
from rlhf_ray.doctor.child import ChildFailure
from rlhf_ray.doctor.engine import judge_sample
from rlhf_ray.rollouts.engine import EngineSpec
from rlhf_ray.types import Trajectory, VersionSpan

SPEC = EngineSpec(
    engine_args={"model": "somewhere"},
    env={"TORCHDYNAMO_DISABLE": "1"},
    eos_token_ids=(0,),
    weight_transfer="shared_memory",
    tensor_parallel_size=1,
    on_gpu=False,
)


def judged(**changed: Any) -> Check:
    trajectory = Trajectory.single_turn(
        token_ids=np.arange(8, dtype=np.int32),
        sampling_logprobs=np.zeros(8, dtype=np.float32),
        asked_version=0,
        version_spans=(VersionSpan(version=0, start=0, end=8),),
        finish_reason="length",
    )
    return judge_sample(replace(trajectory, **changed), startup_s=24.6, generate_s=0.25)


def test_an_engine_that_writes_is_well() -> None:
    check = judged()
    assert check.status == "ok"
    assert check.detail == "started in 25 s, wrote 8 tokens in 0.2 s"


def test_an_engine_that_writes_nonsense_is_not() -> None:
    assert judged(sampling_logprobs=np.full(8, np.nan, dtype=np.float32)).status == "fail"
    three = {"token_ids": np.arange(3), "sampling_logprobs": np.zeros(3), "version_spans": (), "turns": ()}
    assert judged(**three).status == "fail"


def test_the_engine_is_started_with_the_environment_of_a_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(engine, "call_in_child", lambda function, spec, **options: asked.append((spec, options)))
    engine.check_engine(SPEC, timeout_s=60.0)
    assert asked == [(SPEC, {"timeout_s": 60.0, "env": SPEC.env})]


def test_an_engine_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def child(*_: Any, **__: Any) -> dict[str, Any]:
        raise ChildFailure("ValueError: head size 7", Path("log.txt"))

    monkeypatch.setattr(engine, "call_in_child", child)
    check = engine.check_engine(SPEC, timeout_s=60.0)
    assert (check.status, check.detail) == ("fail", "ValueError: head size 7")
    assert "log.txt" in check.remedy
