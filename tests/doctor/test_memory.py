from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import Qwen2Config

from rlhf_ray.config.settings import (
    CheckpointingSettings,
    FaultToleranceSettings,
    LearnerSettings,
    ReportingSettings,
    ResourceSettings,
    RolloutSettings,
    Settings,
    TrainingSettings,
)
from rlhf_ray.doctor.check import Check
from rlhf_ray.doctor.machine import Machine
from rlhf_ray.doctor.memory import MemoryNeed, ModelFacts, check_disk, check_memory

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
    (check,) = check_memory(settings, machine(available_gib=available_gib), needed, on_gpu=False, colocated=False)
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
    found = check_memory(
        settings, machine(gpus=1, gpu_gib=gpu_gib, available_gib=99), need(settings), on_gpu=True, colocated=False
    )
    assert statuses(found) == {"learner memory": learner, "engine memory": engine, "memory": "ok"}


@pytest.mark.parametrize("colocated", [False, True])
@pytest.mark.parametrize(
    ("billions", "gpus", "a_gpu", "in_host", "away"),
    # Policy and critic. GiB of weights, gradients and Adam on a GPU: 2 * 16 bytes a parameter. In host memory: copies
    # of 2 * 24, and where GPUs are shared 2 * 12 of learners that are away, and 2 of each sleeping engine.
    [
        (0.5, 1, 14.9, 22.4, 12.1),
        (1.5, 2, 22.4, 67.1, 39.1),
        (7.0, 8, 26.1, 312.9, 260.8),
        (32.0, 16, 59.6, 1430.5, 1668.9),
    ],
)
def test_the_arithmetic_of_models_and_gpus(
    billions: float, gpus: int, a_gpu: float, in_host: float, away: float, colocated: bool, machine: MakeMachine
) -> None:
    settings = Settings(
        learners=LearnerSettings(num_learners=gpus),
        rollouts=RolloutSettings(num_replicas=gpus),
        resources=ResourceSettings(colocate=colocated),
    )
    needed = need(settings, policy=int(billions * BILLION))
    assert needed.learner / GIB == pytest.approx(a_gpu, abs=0.05)
    total = in_host + colocated * away + 1.5 + gpus * (0.7 + 1.3)

    def memory(available_gib: float) -> Check:
        here = machine(gpus=gpus, available_gib=available_gib)
        return list(check_memory(settings, here, needed, on_gpu=True, colocated=colocated))[2]

    assert memory(total * 1.3).status == "ok"
    assert memory(total * 1.01).status == "warn"
    assert memory(total * 0.99).status == "fail"


def test_what_an_optimizer_keeps_in_host_memory_is_there_in_any_turn(machine: MakeMachine) -> None:
    settings = Settings(learners=LearnerSettings(offload_optimizer=True))
    assert need(settings).away == need(settings).offloaded == 32 * BILLION


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
    learner, *_ = check_memory(settings, machine(gpus=8, gpu_gib=24), need(settings), on_gpu=True, colocated=False)
    assert "times 2" in learner.remedy  # 29.8 GiB over two GPUs of 24, of which a pass takes about 8


def test_a_group_that_does_not_fit_is_slow(machine: MakeMachine) -> None:
    settings = Settings(rollouts=RolloutSettings(group_size=64))
    # 0.85 * 4 GiB - 1.86 GiB leave 1.54 GiB; a sequence of 1,000 tokens takes 27 MiB: 57 of them.
    _, engine, _ = check_memory(settings, machine(gpus=1, gpu_gib=4), need(settings), on_gpu=True, colocated=False)
    assert engine.status == "warn"
    assert "57 longest sequences" in engine.detail


def test_learners_on_the_cpu_beside_engines_on_gpus(machine: MakeMachine) -> None:
    settings = Settings(learners=LearnerSettings(num_gpus_per_learner=0))
    found = check_memory(settings, machine(gpus=1, available_gib=24), need(settings), on_gpu=True, colocated=False)
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
