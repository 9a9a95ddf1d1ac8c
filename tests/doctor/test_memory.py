from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import Qwen2Config

from rlhf_ray.doctor.check import Check
from rlhf_ray.doctor.machine import Machine
from rlhf_ray.doctor.memory import MemoryNeed, check_disk, check_memory
from rlhf_ray.doctor.model import ModelFacts
from rlhf_ray.settings import (
    CheckpointingSettings,
    FaultToleranceSettings,
    LearnerSettings,
    ReportingSettings,
    ResourceSettings,
    RolloutSettings,
    Settings,
    TrainingSettings,
)

MakeMachine = Callable[..., Machine]
GIB = 1024**3
BILLION = 10**9


def model(num_parameters: int) -> ModelFacts:
    """28 layers, 2 key-value heads of 128: 28,672 numbers of cache a token."""
    config = Qwen2Config(num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, hidden_size=1536)
    return ModelFacts("model", num_parameters, config)


def need(settings: Settings, *, policy: int = BILLION, critic: int | None = None, **given: Any) -> MemoryNeed:
    facts = model(policy)
    values: dict[str, Any] = {"dtype_bytes": 2, "max_tokens": 1000, **given}
    return MemoryNeed.of(settings, facts, facts if critic is None else model(critic), **values)


def test_sixteen_bytes_a_trained_parameter() -> None:
    # 4 weights + 4 gradients + 8 Adam, for policy and critic.
    assert need(Settings()).learner == 32 * BILLION
    assert need(Settings(), critic=BILLION // 2).learner == 24 * BILLION


def test_a_reference_is_weights_alone_in_the_type_it_computes_in() -> None:
    settings = Settings(training=TrainingSettings(kl_coef=0.1))
    assert need(settings).learner == 34 * BILLION
    assert need(settings, dtype_bytes=4).learner == 36 * BILLION


@pytest.mark.parametrize(
    ("reference", "optimizer", "billions"), [(True, False, 2), (False, True, 32), (True, True, 34)]
)
def test_what_is_offloaded_is_not_on_the_gpu(reference: bool, optimizer: bool, billions: int) -> None:
    learners = LearnerSettings(offload_reference=reference, offload_optimizer=optimizer, num_learners=2)
    needed = need(Settings(training=TrainingSettings(kl_coef=0.1), learners=learners))
    assert (needed.learner, needed.offloaded) == (17 * BILLION, billions * BILLION // 2)


def test_learners_share() -> None:
    assert need(Settings(learners=LearnerSettings(num_learners=4))).learner == 8 * BILLION


def test_an_engine_holds_weights_and_cache() -> None:
    one = need(Settings())
    assert one.engine_weights == 2 * BILLION
    # keys and values * layers * heads * head size * bytes * tokens
    assert one.sequence == 2 * 28 * 2 * 128 * 2 * 1000
    two = need(Settings(rollouts=RolloutSettings(tensor_parallel_size=2)))
    assert (two.engine_weights, two.sequence) == (BILLION, one.sequence // 2)


def on_cpu(available_gib: float, machine: MakeMachine, settings: Settings | None = None, **given: Any) -> Check:
    settings = settings or Settings()
    needed = need(settings, policy=BILLION // 10, dtype_bytes=4, cpu_cache=GIB, **given)
    (check,) = check_memory(settings, machine(available_gib=available_gib), needed, on_gpu=False)
    return check


def test_a_cpu_machine_must_hold_everything(machine: MakeMachine) -> None:
    # Learner 3.2e9 B = 3.0 GiB; copies 4.8e9 B = 4.5 GiB; engine 0.37 + 1 GiB; programs 0.7 + 1.3 + 1.5 GiB: 12 GiB.
    assert on_cpu(17, machine).status == "ok"
    assert on_cpu(14, machine).status == "warn"
    assert on_cpu(11, machine).status == "fail"
    assert on_cpu(17, machine).detail.startswith("12 GiB (")


@pytest.mark.parametrize(
    "without", [FaultToleranceSettings(state_interval=0), FaultToleranceSettings(max_learner_restarts=0)]
)
def test_no_copies_where_nothing_is_kept(machine: MakeMachine, without: FaultToleranceSettings) -> None:
    check = on_cpu(12, machine, Settings(fault_tolerance=without))
    assert check.status == "ok"
    assert "7.9 GiB" in check.detail


def test_every_replica_of_a_cpu_machine_counts(machine: MakeMachine) -> None:
    assert on_cpu(17, machine, Settings(rollouts=RolloutSettings(num_replicas=4))).status == "fail"


def test_a_cluster_is_not_judged_by_this_machine(machine: MakeMachine) -> None:
    assert on_cpu(1, machine, Settings(resources=ResourceSettings(ray_address="head:6379"))).status == "ok"


def statuses(checks: Iterable[Check]) -> dict[str, str]:
    return {check.name: check.status for check in checks}


@pytest.mark.parametrize(
    ("gpu_gib", "learner", "engine"),
    [
        (80, "ok", "ok"),  # a learner takes 29.8 GiB, and about 8 to compute
        (34, "warn", "ok"),
        (24, "fail", "ok"),
        (2, "fail", "fail"),
    ],
)
def test_gpus(machine: MakeMachine, gpu_gib: float, learner: str, engine: str) -> None:
    settings = Settings()
    found = check_memory(settings, machine(gpus=1, gpu_gib=gpu_gib, available_gib=100), need(settings), on_gpu=True)
    assert statuses(found) == {"learner memory": learner, "engine memory": engine, "host memory": "ok"}


# Parameters of Qwen2.5 models in billions, and what PPO with a critic as large takes of them: bytes per parameter.
@pytest.mark.parametrize("billions", [0.494, 1.544, 7.616, 32.764])
@pytest.mark.parametrize("num_learners", [1, 8])
@pytest.mark.parametrize("colocated", [False, True])
def test_what_sizes_of_models_take_on_gpus_and_hosts(
    machine: MakeMachine, billions: float, num_learners: int, colocated: bool
) -> None:
    parameters = int(billions * 1e9)
    settings = Settings(
        learners=LearnerSettings(num_learners=num_learners), rollouts=RolloutSettings(num_replicas=num_learners)
    )
    found = need(settings, policy=parameters)
    # 4 weights + 4 gradients + 8 Adam, twice; kept states are two of 12, what sleeps is one.
    assert found.learner == 32 * parameters // num_learners
    assert found.copies == 48 * parameters // num_learners
    assert found.asleep == 24 * parameters // num_learners
    assert found.engine_weights == 2 * parameters
    asleep = colocated * (24 * parameters + num_learners * 2 * parameters)
    programs = (0.7 + 1.3) * num_learners + 1.5
    on_host = (48 * parameters + asleep) / GIB + programs
    here = {"gpus": num_learners * (1 if colocated else 2), "gpu_gib": 141}
    for free, status in ((on_host + 1, "ok"), (on_host - 1, "fail")):
        checks = check_memory(settings, machine(**here, available_gib=free), found, on_gpu=True, colocated=colocated)
        assert statuses(checks)["host memory"] == status
    on_gpu = found.learner / GIB + (1.5 if colocated else 0)
    for size, fails in ((on_gpu + 1, False), (on_gpu - 1, True)):
        learner, *_ = check_memory(
            settings, machine(gpus=1, gpu_gib=size, available_gib=1e6), found, on_gpu=True, colocated=colocated
        )
        assert (learner.status == "fail") is fails


def test_an_estimate_of_a_pass_grows_with_its_tokens_and_with_activations_that_are_kept() -> None:
    def working(tokens: int, recomputed: bool) -> int:
        learners = LearnerSettings(max_tokens_per_microbatch=tokens, gradient_checkpointing=recomputed)
        return need(Settings(learners=learners)).working

    config = model(BILLION).config
    layer = (10 * 1536 + 3 * config.intermediate_size) * 2
    # A layer's input for each of 28 layers, and all of one layer; or all of all.
    assert working(2000, True) - working(1000, True) == 1000 * (28 * 1536 * 2 + layer)
    assert working(2000, False) - working(1000, False) == 1000 * 28 * layer


def test_an_engine_leaves_room_for_a_learner_that_sleeps(machine: MakeMachine) -> None:
    here = machine(gpus=1, gpu_gib=80)
    for share, status in ((0.95, "ok"), (0.99, "fail")):
        settings = Settings(rollouts=RolloutSettings(gpu_memory_utilization=share))
        _, engine, _ = check_memory(settings, here, need(settings), on_gpu=True, colocated=True)
        assert engine.status == status


def test_the_remedy_shards_enough(machine: MakeMachine) -> None:
    settings = Settings()
    learner, *_ = check_memory(settings, machine(gpus=8, gpu_gib=24), need(settings), on_gpu=True)
    assert "times 2" in learner.remedy  # 29.8 GiB over two GPUs of 24, of which a pass takes about 8


def test_a_group_that_does_not_fit_is_slow(machine: MakeMachine) -> None:
    settings = Settings(rollouts=RolloutSettings(group_size=64))
    # 0.85 * 4 GiB - 1.86 GiB leave 1.54 GiB; a sequence of 1,000 tokens takes 27 MiB: 57 of them.
    _, engine, _ = check_memory(settings, machine(gpus=1, gpu_gib=4), need(settings), on_gpu=True)
    assert engine.status == "warn"
    assert "57 longest sequences" in engine.detail


def test_learners_on_the_cpu_beside_engines_on_gpus(machine: MakeMachine) -> None:
    settings = Settings(learners=LearnerSettings(num_gpus_per_learner=0))
    found = check_memory(settings, machine(gpus=1, available_gib=24), need(settings), on_gpu=True)
    assert statuses(found) == {"memory": "fail", "engine memory": "ok"}


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.mark.parametrize(
    ("free_gib", "interval", "status"),
    [
        (5, 0, "ok"),  # 0.25 of logs and 3.7 of the exported model
        (3, 0, "fail"),
        (5, 10, "fail"),  # and (2 + 1) checkpoints of 24e9 B
        (75, 10, "ok"),
    ],
)
def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_gib: int, interval: int, status: str) -> None:
    looked_at: list[Path] = []

    def usage(path: Path) -> Usage:
        looked_at.append(path)
        return Usage(0, 0, free_gib * GIB)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    settings = replace(
        Settings(),
        checkpointing=CheckpointingSettings(interval=interval, keep=2),
        reporting=ReportingSettings(run_dir=str(tmp_path / "not" / "there" / "yet")),
    )
    assert check_disk(settings, model(BILLION), model(BILLION)).status == status
    assert looked_at == [tmp_path]
