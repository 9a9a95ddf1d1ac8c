"""Parts that are killed in the middle of a run: what they would have done is done with the same numbers."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlhf_ray import PPOConfig
from rlhf_ray.algorithms.algorithm import Algorithm

pytestmark = pytest.mark.engine

LEARNER, ENGINE, REWARDS = "ray::RayTrainWorker", "VLLM::EngineCore", "ray::SequentialRewardWorker"


Send = Callable[..., None]


@pytest.fixture
def send(processes: Callable[[str], list[psutil.Process]]) -> Send:
    """Send a signal to the newest process of a title."""

    def send(title: str, number: int = signal.SIGKILL) -> None:
        processes(title)[-1].send_signal(number)

    return send


@pytest.fixture(scope="module")
def run(
    cluster: None, small: Callable[[Path], PPOConfig], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Algorithm]:
    config = small(tmp_path_factory.mktemp("run") / "failing")
    config.rollouts(num_replicas=1).rewards(timeout_s=5.0).fault_tolerance(max_learner_restarts=10)
    algorithm = config.build_algo()
    yield algorithm
    algorithm.stop()


def figures(result: dict[str, Any]) -> dict[str, float]:
    learner = result["learner"]
    return {name: learner[name] for name in ("policy_loss", "value_loss", "grad_norm", "critic_grad_norm", "entropy")}


@pytest.mark.parametrize("when", ["in the update", pytest.param("idle", marks=pytest.mark.slow)])
def test_a_killed_learner_changes_nothing(
    run: Algorithm, send: Send, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.train()
    run.save_to_path(tmp_path / "before")
    expected = run.train(), run.train()
    run.restore_from_path(tmp_path / "before")

    learners = run._running().learners
    update, restarts = learners.update, learners.restarts

    def update_and_kill(*arguments: Any, **keywords: Any) -> dict[str, float]:
        threading.Timer(0.1, send, [LEARNER]).start()
        return update(*arguments, **keywords)

    if when == "idle":
        send(LEARNER)
    else:
        monkeypatch.setattr(learners, "update", update_and_kill)
    first = run.train()
    monkeypatch.undo()
    second = run.train()

    assert learners.restarts == restarts + 1
    assert first["fault_tolerance"]["learner_restarts"] == learners.restarts
    assert [figures(one) for one in (first, second)] == [figures(one) for one in expected]
    assert second["learner"]["policy_version"] == expected[1]["learner"]["policy_version"]


def test_a_reward_worker_that_hangs_is_replaced_and_its_group_counted(run: Algorithm, send: Send) -> None:
    send(REWARDS, signal.SIGSTOP)
    before = run._running().rewards.workers_replaced
    result = run.train()
    assert result["fault_tolerance"]["reward_workers_replaced"] == before + 1
    assert result["rewards"]["failures"] == {"timeout": 1}


def test_a_killed_engine_ends_its_replica_and_another_one_is_started(run: Algorithm, send: Send) -> None:
    send(ENGINE)
    first, second = run.train(), run.train()
    assert second["fault_tolerance"]["replica_restarts"] == 1
    assert second["learner"]["policy_version"] == first["learner"]["policy_version"] + 1
    assert second["learner"]["sampling_logprob_diff_max"] < 1e-3
