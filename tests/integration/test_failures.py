"""Parts that are killed together with the only replica: what they would have done is done with the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from rlhf_ray import GRPOConfig, LearnerError, PPOConfig
from rlhf_ray.algorithm.algorithm import Algorithm
from rlhf_ray.errors import WeightSyncError
from rlhf_ray.weight_sync.manifest import WeightManifest

pytestmark = [pytest.mark.engine, pytest.mark.slow]

LEARNER, ENGINE = "ray::RayTrainWorker", "VLLM::EngineCore"
REPLICA, BRIDGE = "ray::ServeReplica", "ray::Bridge"

Send = Callable[..., None]


@pytest.fixture(scope="module")
def run(
    cluster: None, small: Callable[[Path], PPOConfig], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Algorithm]:
    config = small(tmp_path_factory.mktemp("run") / "failing")
    # Every second state is kept: the update since then is made again.
    config.rollouts(num_replicas=1).fault_tolerance(max_learner_restarts=10, state_interval=2)
    config.checkpointing(interval=1)
    algorithm = config.build_algo()
    yield algorithm
    algorithm.stop()


def figures(result: dict[str, Any]) -> dict[str, float]:
    learner = result["learner"]
    return {name: learner[name] for name in ("policy_loss", "value_loss", "grad_norm", "critic_grad_norm", "entropy")}


def killing(titles: list[str], send: Send, done: Callable[..., Any]) -> Callable[..., Any]:
    """What ``done`` does, after which processes have been killed, once."""
    left = list(titles)

    def kill_and_do(*arguments: Any) -> Any:
        while left:
            send(left.pop())
        return done(*arguments)

    return kill_and_do


@pytest.mark.parametrize("phase", ["rollouts", "publication"])
def test_learners_that_die_with_the_only_replica_change_nothing(
    run: Algorithm, send: Send, phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replica that is started asks for weights that learners without a state do not have."""
    run.train()
    run.save_to_path(tmp_path / "before")
    expected = run.train(), run.train()
    run.restore_from_path(tmp_path / "before")

    parts = run._running()
    restarts = parts.learners.restarts
    if phase == "rollouts":
        monkeypatch.setattr(parts.controller, "collect", killing([LEARNER, REPLICA], send, parts.controller.collect))
    else:
        publisher = parts.weight_sync._publisher
        monkeypatch.setattr(publisher, "_ask_all", killing([LEARNER, REPLICA], send, publisher._ask_all))
    first = run.train()
    monkeypatch.undo()
    second = run.train()

    assert parts.learners.restarts == restarts + 1
    assert [figures(one) for one in (first, second)] == [figures(one) for one in expected]
    assert second["learner"]["sampling_logprob_diff_max"] < 1e-3


@pytest.mark.parametrize("phase", ["rollouts", "publication", "evaluation"])
def test_a_state_that_is_lost_with_the_only_replica_sends_the_run_back(
    run: Algorithm, send: Send, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run.train()
    run._checkpoints.wait_pending()
    parts = run._running()
    restarts = parts.learners.restarts
    holder, name = {
        "rollouts": (parts.controller, "collect"),
        "publication": (parts.weight_sync._publisher, "_ask_all"),
        "evaluation": (parts.controller, "score_prompts"),
    }[phase]
    # The bridge keeps the learners' state.
    monkeypatch.setattr(holder, name, killing([LEARNER, BRIDGE, REPLICA], send, getattr(holder, name)))
    if phase == "evaluation":
        monkeypatch.setattr(run, "_evaluation_of", lambda number: run.evaluate())
    after = run.train()
    monkeypatch.undo()

    assert parts.learners.restarts == restarts + 1
    assert after["training_iteration"] == before["training_iteration"] + 1
    assert after["learner"]["policy_version"] > before["learner"]["policy_version"] + 1
    assert after["learner"]["sampling_logprob_diff_max"] < 1e-3


def test_a_killed_engine_ends_its_replica_and_another_one_is_started(run: Algorithm, send: Send) -> None:
    restarts = run.train()["fault_tolerance"]["replica_restarts"]
    send(ENGINE)
    first, second = run.train(), run.train()
    assert second["fault_tolerance"]["replica_restarts"] == restarts + 1
    assert second["learner"]["policy_version"] == first["learner"]["policy_version"] + 1
    assert second["learner"]["sampling_logprob_diff_max"] < 1e-3


def always_one(*, completions: list[str], **_: Any) -> list[float]:
    return [1.0] * len(completions)


def test_an_update_that_is_not_finite_ends_the_run_before_anything_is_published_or_saved(
    cluster: None, tmp_path: Path
) -> None:
    advantage = tmp_path / "advantage.py"
    advantage.write_text("def zscore(rewards, group_ids):\n    return (rewards - rewards.mean()) / rewards.std()\n")
    config = (
        GRPOConfig()
        .data(batch_size=8)
        .rewards(always_one)
        .rollouts(num_replicas=1, group_size=4, num_threads=1)
        .learners(num_learners=2, num_threads=1)
        .training(iterations=3, advantage=f"{advantage}:zscore", whiten_advantages=False)
        .evaluation(num_prompts=8)
        .checkpointing(interval=1)
        .reporting(run_dir=str(tmp_path / "run"))
    )
    algorithm = config.build_algo()
    try:
        for _ in range(2):  # A second try changes nothing.
            with pytest.raises(LearnerError, match="policy version 1: advantages not finite, first in sequence 0 "):
                algorithm.train()
        learners = algorithm._running().learners
        assert (algorithm.policy_version, learners.restarts) == (0, 0)
        assert ray.get(learners.bridge.newest_version.remote()) == 0
        assert list((algorithm.run_dir / "checkpoints").glob("*")) == []
    finally:
        algorithm.stop()


def test_replicas_that_cannot_load_weights_say_why_and_are_replaced(
    run: Algorithm, monkeypatch: pytest.MonkeyPatch
) -> None:
    learners = run._running().learners
    publish = learners.publish

    def misnamed() -> tuple[WeightManifest, list[Any]]:
        manifest, refs = publish()
        buckets = [
            replace(bucket, tensors=tuple(replace(tensor, name=f"lost.{tensor.name}") for tensor in bucket.tensors))
            for bucket in manifest.buckets
        ]
        return replace(manifest, publication="misnamed", buckets=tuple(buckets)), refs

    before = run.train()
    monkeypatch.setattr(learners, "publish", misnamed)
    with pytest.raises(WeightSyncError, match="named 'lost'"):
        run.train()
    monkeypatch.undo()
    after = run.train()
    assert after["training_iteration"] == before["training_iteration"] + 1
    assert after["learner"]["sampling_logprob_diff_max"] < 1e-3
