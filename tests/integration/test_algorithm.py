"""The whole loop on the real stack: Ray Data, Serve with two vLLM replicas, reward actors, two FSDP2 learners."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import ray
import torch
import yaml
from ray.util.state import list_actors, list_placement_groups

from rlhf_ray import PPOConfig, ReMaxConfig, RewardError, RolloutError, register_advantage, register_loss
from rlhf_ray.algorithm.algorithm import Algorithm
from rlhf_ray.checkpoints.checkpoint import Checkpoint
from rlhf_ray.checkpoints.folder import Folder
from rlhf_ray.config import plugins
from rlhf_ray.reporting.metrics import flatten, metric_for
from rlhf_ray.types import LoadReport

pytestmark = pytest.mark.engine

LEARNER, REWARD_WORKER = "ray::RayTrainWorker", "ray::SequentialRewardWorker"


def replica_reports(algorithm: Algorithm) -> list[LoadReport]:
    parts = algorithm._running()
    return list(parts.app.handle.broadcast("status").results(timeout_s=60))


def test_iterations_are_exact_and_reported(algorithm: Algorithm) -> None:
    first, second = algorithm.train(), algorithm.train()
    for result in (first, second):
        # The second batch was sampled by weights that went through a publication, on both replicas.
        assert result["learner"]["sampling_logprob_diff_max"] < 1e-3
        assert result["learner"]["first_ratio_deviation_max"] == 0.0
        assert result["rollouts"]["num_groups"] == 12
        assert result["rollouts"]["num_completions"] == 48
        assert result["rollouts"]["staleness_max"] == 0
    assert first["training_iteration"] == 1
    assert second["learner"]["policy_version"] == algorithm.policy_version == 2
    undeclared = [key for key in flatten(second) if metric_for(key) is None]
    assert undeclared == []


def test_every_replica_serves_the_published_version(algorithm: Algorithm) -> None:
    async def notebook() -> None:  # Where an event loop runs.
        algorithm.train()

    asyncio.run(notebook())
    reports = replica_reports(algorithm)
    assert len({report.replica_id for report in reports}) == 2
    assert {report.version for report in reports} == {algorithm.policy_version}


def test_both_replicas_write_rollouts(algorithm: Algorithm) -> None:
    groups = algorithm._running().controller.collect(algorithm.policy_version).groups
    assert len({scored.group.replica_id for scored in groups}) == 2
    spans = [span for scored in groups for c in scored.group.trajectories for span in c.version_spans]
    assert {span.version for span in spans} == {algorithm.policy_version}
    # These groups were taken out of the loop: the next version must not count them as trained on.
    algorithm._running().controller.resume(algorithm.policy_version)


def test_run_directory(algorithm: Algorithm) -> None:
    result = algorithm.train()
    lines = [json.loads(line) for line in (algorithm.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["training_iteration"] == result["training_iteration"] == len(lines)
    assert lines[-1]["rollouts/reward_mean"] == pytest.approx(result["rollouts"]["reward_mean"])
    rows = pq.read_table(algorithm.run_dir / "completions" / "step_000001.parquet").to_pylist()
    assert len(rows) == 48
    assert all("".join(row["token_texts"]) == row["completion"] for row in rows)
    # Two learners computed them, each for its own sequences.
    assert all(len(row["advantages"]) == row["num_tokens"] for row in rows)
    last = {reward: [row["advantages"][-1] for row in rows if row["reward"] == reward] for reward in (0.0, 1.0)}
    assert max(last[0.0]) < min(last[1.0])
    resolved = PPOConfig.from_yaml(algorithm.run_dir / "config.yaml")
    assert resolved.settings.rollouts.num_replicas == 2
    assert yaml.safe_load((algorithm.run_dir / "config.yaml").read_text())["data"]["batch_size"] == 12
    assert list(algorithm.run_dir.rglob("events.out.tfevents.*"))
    assert list(algorithm.run_dir.rglob("offline-run-*"))


def test_evaluation_is_greedy_and_repeatable(algorithm: Algorithm) -> None:
    first, second = algorithm.evaluate(), algorithm.evaluate()
    assert first["quickstart"]["num_prompts"] == 32
    assert 0.0 <= first["quickstart"]["reward_mean"] <= 1.0
    assert first == second


def test_save_restore_and_export(algorithm: Algorithm, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

    checkpoint = algorithm.save_to_path(tmp_path / "checkpoint")
    version, position = algorithm.policy_version, algorithm._inputs.prompts.state()
    before = algorithm.evaluate()
    algorithm.export_hf(tmp_path / "before")
    algorithm.train()
    algorithm.restore_from_path(checkpoint)
    assert (algorithm.policy_version, algorithm._inputs.prompts.state()) == (version, position)
    algorithm.export_hf(tmp_path / "after")
    old = AutoModelForCausalLM.from_pretrained(tmp_path / "before")
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    for (name, a), (_, b) in zip(old.state_dict().items(), new.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert AutoTokenizer.from_pretrained(tmp_path / "after")("1+1=").input_ids
    critic = AutoModelForTokenClassification.from_pretrained(tmp_path / "after" / "critic")
    assert critic.score.weight.abs().sum() > 0
    # The replicas went back to the restored weights, under a version that they had left behind.
    assert {report.version for report in replica_reports(algorithm)} == {version}
    assert algorithm.evaluate() == before


def test_the_exported_policy_samples_what_the_replicas_sample(algorithm: Algorithm, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(algorithm.export_hf(tmp_path / "export"))
    scored = algorithm.sample_evaluation()[0]
    prompt, completion = scored.group.prompt, scored.group.trajectories[0]
    ids = torch.from_numpy(np.concatenate([prompt.token_ids, completion.token_ids]).astype(np.int64))[None]
    with torch.no_grad():
        greedy = model(ids).logits[0, len(prompt.token_ids) - 1 : -1].argmax(-1)
    assert greedy.tolist() == completion.token_ids.tolist()


def test_an_interrupted_update_is_not_made_twice(
    algorithm: Algorithm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in a notebook or a shell, and on with the same algorithm."""
    learners = algorithm._running().learners
    version, iteration = algorithm.policy_version, algorithm.iteration
    wait_for = learners._await

    def interrupt(ref: Any, purpose: str) -> Any:
        answer = wait_for(ref, purpose)
        if purpose == "to update":
            raise KeyboardInterrupt
        return answer

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(learners, "_await", interrupt)
        algorithm.train()
    algorithm.save_to_path(tmp_path / "checkpoint")
    saved = Checkpoint(Folder.at(tmp_path / "checkpoint")).state()
    assert (saved.policy_version, saved.iteration) == (version + 1, iteration + 1)

    for number, result in enumerate((algorithm.train(), algorithm.train()), start=1):
        assert result["training_iteration"] == iteration + number
        assert result["learner"]["policy_version"] == version + number
        assert result["learner"]["sampling_logprob_diff_max"] < 1e-3
        assert result["learner"]["first_ratio_deviation_max"] == 0.0


def test_a_killed_replica_is_survived_and_comes_back_with_the_newest_weights(algorithm: Algorithm) -> None:
    algorithm.train()
    victim = next(actor for actor in list_actors(filters=[("state", "=", "ALIVE")]) if "RolloutReplica" in actor.name)
    engines = psutil.Process(victim.pid).children(recursive=True)
    os.kill(victim.pid, signal.SIGKILL)
    result = algorithm.train()
    assert engines
    assert psutil.wait_procs(engines, timeout=30)[1] == []
    assert result["rollouts"]["num_groups"] == 12
    assert result["learner"]["sampling_logprob_diff_max"] < 1e-3
    deadline = time.monotonic() + 240
    while len(replica_reports(algorithm)) < 2:
        assert time.monotonic() < deadline, "the replica was not replaced"
        time.sleep(2)
    assert {report.version for report in replica_reports(algorithm)} == {algorithm.policy_version}
    assert algorithm.train()["learner"]["sampling_logprob_diff_max"] < 1e-3


@pytest.mark.parametrize("when", ["in the update", pytest.param("idle", marks=pytest.mark.slow)])
def test_a_killed_learner_changes_nothing(
    algorithm: Algorithm, send: Callable[..., None], when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm.save_to_path(tmp_path / "before")
    expected = algorithm.train(), algorithm.train()
    algorithm.restore_from_path(tmp_path / "before")

    learners = algorithm._running().learners
    update, restarts = learners.update, learners.restarts

    def update_and_kill(*arguments: Any, **keywords: Any) -> dict[str, float]:
        threading.Timer(0.1, send, [LEARNER]).start()
        return update(*arguments, **keywords)

    if when == "idle":
        send(LEARNER)
    else:
        monkeypatch.setattr(learners, "update", update_and_kill)
    first = algorithm.train()
    monkeypatch.undo()
    second = algorithm.train()

    assert learners.restarts == restarts + 1
    assert first["fault_tolerance"]["learner_restarts"] == learners.restarts
    for found, wanted in zip((first, second), expected, strict=True):
        for name in ("policy_loss", "value_loss", "grad_norm", "critic_grad_norm", "entropy", "policy_version"):
            assert found["learner"][name] == wanted["learner"][name], name


def test_a_reward_worker_that_hangs_is_replaced_and_its_group_counted(
    algorithm: Algorithm, send: Callable[..., None]
) -> None:
    before = algorithm._running().rewards.workers_replaced
    send(REWARD_WORKER, signal.SIGSTOP)
    result = algorithm.train()
    assert result["fault_tolerance"]["reward_workers_replaced"] == before + 1
    assert result["rewards"]["failures"] == {"timeout": 1}


def test_a_reset_begins_again_with_other_numbers_in_the_same_processes(
    algorithm: Algorithm, small: Callable[[Path], PPOConfig], tmp_path: Path
) -> None:
    checkpoint, version = algorithm.save_to_path(tmp_path / "checkpoint"), algorithm.policy_version
    replicas = {report.replica_id for report in replica_reports(algorithm)}
    timeout_s = algorithm.settings.rewards.timeout_s
    other = small(tmp_path / "other").training(lr=1e-5).rewards(timeout_s=timeout_s)
    assert algorithm.reset(other.to_dict())
    first = algorithm.train()
    assert (first["training_iteration"], first["learner"]["policy_version"]) == (1, 1)
    algorithm.restore_from_path(checkpoint)
    second = algorithm.train()
    assert second["learner"]["policy_version"] == version + 1
    for result in (first, second):
        assert result["learner"]["lr"] == pytest.approx(1e-5, rel=0.1)
        assert result["learner"]["sampling_logprob_diff_max"] < 1e-3
        assert result["learner"]["first_ratio_deviation_max"] == 0.0
    assert {report.replica_id for report in replica_reports(algorithm)} == replicas
    lines = (tmp_path / "other" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["learner/policy_version"] for line in lines] == [1, version + 1]


def living_actors() -> set[str]:
    """Classes of the actors that are alive, without the singletons that Ray Data keeps on a cluster for everybody."""
    kept_by_ray_data = {"_AutoscalingCoordinatorActor", "_StatsActor"}
    return {actor.class_name for actor in list_actors(filters=[("state", "=", "ALIVE")])} - kept_by_ray_data


def test_stop_leaves_nothing_behind(algorithm: Algorithm) -> None:
    """The last test of the session's algorithm."""
    algorithm.stop()
    algorithm.stop()
    deadline = time.monotonic() + 30
    while living_actors() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert living_actors() == set()
    assert [g for g in list_placement_groups() if g.state == "CREATED"] == []
    with pytest.raises(RuntimeError, match="stopped"):
        algorithm.train()


def test_a_replica_that_cannot_start_says_why_and_leaves_nothing(cluster: None, tmp_path: Path) -> None:
    config = (
        PPOConfig()
        .reporting(run_dir=str(tmp_path / "run"))
        .rollouts(engine_args={"scheduling_policy": "no-such-thing"})
    )
    with pytest.raises(RolloutError, match=r"cannot start: ValidationError.*no-such-thing"):
        config.build_algo()
    assert [g for g in list_placement_groups() if g.state == "CREATED"] == []
    assert ray.is_initialized()


class FailsElsewhere:
    """A reward that leaves this process well and cannot be made in another one."""

    def __init__(self, pid: int) -> None:
        if os.getpid() != pid:
            raise OSError("no such judge here")
        self._pid = pid

    def __reduce__(self) -> Any:
        return FailsElsewhere, (self._pid,)

    def __call__(self, *, completions: list[str], **columns: Any) -> list[float]:
        return [0.0] * len(completions)


@pytest.mark.slow
def test_a_part_that_cannot_start_ends_the_wait_for_the_others(cluster: None, tmp_path: Path) -> None:
    started = time.monotonic()
    config = PPOConfig().reporting(run_dir=str(tmp_path / "run")).rewards(FailsElsewhere(os.getpid()))
    with pytest.raises(RewardError, match="no such judge here"):
        config.build_algo()
    # The replicas have minutes to start, but for one of which nobody waits any more.
    assert time.monotonic() - started < config.settings.rollouts.startup_timeout_s / 2
    assert living_actors() == set()


@pytest.mark.slow
def test_a_relative_without_a_critic_trains_by_a_users_own_functions(tmp_path: Path) -> None:
    # ReMax's greedy baseline, dynamic sampling and two functions of this file, which workers cannot import.
    def above_greedy(rewards: torch.Tensor, greedy_rewards: torch.Tensor, scale: float) -> torch.Tensor:
        return scale * (rewards - greedy_rewards)

    def reinforce(logprobs: Any, old_logprobs: Any, advantages: Any, mask: Any, normalizer: float) -> Any:
        loss = -(logprobs * advantages * mask).sum() / normalizer
        return loss, {"ratio_mean": (logprobs - old_logprobs).exp().detach()[mask].mean()}

    register_advantage("above_greedy")(above_greedy)
    register_loss("reinforce")(reinforce)
    config = (
        ReMaxConfig()
        .data(batch_size=12)
        .rollouts(dynamic_sampling=True)
        .training(advantage="above_greedy", advantage_args={"scale": 2.0}, loss="reinforce", mask_truncated=True)
        .reporting(run_dir=str(tmp_path / "run"), progress="off")
    )
    algorithm = config.build()
    try:
        results = [algorithm.train() for _ in range(2)]
        groups = algorithm._running().controller.collect(algorithm.policy_version).groups
        checkpoint = algorithm.save_to_path(tmp_path / "checkpoint")
        exported = algorithm.export_hf(tmp_path / "export")
        algorithm.restore_from_path(checkpoint)
    finally:
        algorithm.stop()
        plugins.ADVANTAGES.plugins.pop("above_greedy")
        plugins.LOSSES.plugins.pop("reinforce")

    for result in results:
        assert result["learner"]["sampling_logprob_diff_max"] < 1e-3
        assert result["learner"]["ratio_mean"] > 0
        assert result["rollouts"]["num_groups"] == 12
        assert not {"value_loss", "critic_lr", "explained_variance"} & result["learner"].keys()
    assert sum(result["rollouts"]["equal_reward_groups"] for result in results) > 0
    assert all(len(set(scored.rewards)) > 1 and scored.greedy_reward in (0.0, 1.0) for scored in groups)
    # Rewards are 0 or 1, so a doubled difference from another reward is -2, 0 or 2.
    assert 0 < results[0]["learner"]["advantage_std"] <= 2.0
    assert (exported / "config.json").exists()
    assert not (exported / "critic").exists()
