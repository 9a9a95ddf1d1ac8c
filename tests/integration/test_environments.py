"""Whole runs of several turns: as exact as one turn, whatever dies, stopped and resumed or not."""

from __future__ import annotations

import json
import random
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from environments.games import Once, Sums
from safetensors.numpy import load_file

from rlhf_ray import GRPOConfig, PPOConfig
from rlhf_ray.types import ScoredGroup

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("cluster")]

ITERATIONS, STOPPED_AFTER = 4, 2
STARTING_S = 8.0


def config_of(run_dir: Path) -> PPOConfig:
    return (
        PPOConfig()
        .data(batch_size=6)
        .rollouts(group_size=4, max_prompt_tokens=16, max_new_tokens=40, num_threads=1)
        .environment(Sums, max_turns=3, max_turn_tokens=6)
        .learners(num_threads=1, max_tokens_per_microbatch=512)
        .training(iterations=ITERATIONS, num_minibatches=2, kl_coef=1e-4, lambda_=0.95)
        .checkpointing(interval=STOPPED_AFTER, keep=5)
        .evaluation(num_prompts=8)
        .fault_tolerance(max_group_retries=20)
        .reporting(run_dir=str(run_dir), progress="off", tensorboard=False)
    )


@dataclass(frozen=True)
class Finished:
    """What a run leaves."""

    run_dir: Path
    groups: list[ScoredGroup]
    results: list[dict[str, Any]]

    def tokens(self) -> list[tuple[int, list[list[int]], list[float]]]:
        return [
            (one.group.group_id, [t.token_ids.tolist() for t in one.group.trajectories], one.rewards.tolist())
            for one in self.groups
        ]

    def weights(self) -> dict[str, Any]:
        parts = {part: load_file(self.run_dir / "model" / part / "model.safetensors") for part in ("", "critic")}
        return {f"{part}/{name}": weight for part, weights in parts.items() for name, weight in weights.items()}

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]


def finish(config: PPOConfig, during: Callable[[threading.Event], None] | None = None) -> Finished:
    groups: list[ScoredGroup] = []
    results: list[dict[str, Any]] = []
    algorithm = config.callbacks(on_rollout_group=lambda *, algorithm, group: groups.append(group)).build_algo()
    done = threading.Event()
    other = threading.Thread(target=during, args=(done,)) if during is not None else None
    try:
        if other is not None:
            other.start()
        while algorithm.iteration < config.settings.training.iterations:
            results.append(algorithm.train())
        done.set()
        if other is not None:
            other.join()
        assert algorithm.run_dir is not None
        algorithm.export_hf(algorithm.run_dir / "model")
    finally:
        done.set()
        algorithm.stop()
    return Finished(run_dir=algorithm.run_dir, groups=groups, results=results)


def assert_same_weights(one: Finished, other: Finished) -> None:
    expected, found = one.weights(), other.weights()
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        np.testing.assert_array_equal(weight, expected[name], err_msg=name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finish(config_of(tmp_path_factory.mktemp("whole") / "run"))


def test_several_turns_are_exact(whole: Finished) -> None:
    for result in whole.results:
        assert result["learner"]["sampling_logprob_diff_max"] < 1e-3
        assert result["learner"]["first_ratio_deviation_max"] < 1e-5
        assert 1.0 < result["rollouts"]["turns_mean"] <= 3.0
    for scored in whole.groups:
        for trajectory, reward in zip(scored.group.trajectories, scored.rewards, strict=True):
            versions = [span.version for span in trajectory.version_spans]
            assert versions == sorted(versions)
            assert reward == trajectory.environment_reward
            assert not trajectory.truncated or trajectory.finish_reason in ("length", "turns")


def test_metrics_and_tables_tell_of_environments(whole: Finished) -> None:
    (environment,) = {name.split("/")[1] for name in whole.rows()[0] if name.startswith("environment/")}
    assert environment == "Sums"
    row = whole.rows()[0]
    assert 0.0 <= row["environment/Sums/right"] <= 1.0
    assert row["environment/Sums/steps_mean"] == pytest.approx(row["rollouts/turns_mean"])
    assert row["rewards/environment/mean"] == pytest.approx(row["environment/Sums/reward_mean"])
    table = pq.read_table(whole.run_dir / "completions" / "step_000001.parquet").to_pydict()
    assert set(table["environment"]) == {"Sums"}
    assert max(table["num_turns"]) == 3
    assert any(not all(sampled) for sampled in table["sampled"])


def test_workers_and_replicas_that_are_killed_change_nothing(
    whole: Finished, tmp_path: Path, processes: Callable[[str], list[psutil.Process]]
) -> None:
    killed: list[str] = []

    def kill(done: threading.Event) -> None:
        drawn = random.Random(0)
        while not done.wait(drawn.uniform(0.2, 2.0)):
            title = "ray::ServeReplica" if len(killed) % 3 == 2 else "ray::EnvironmentWorker"
            # Not while it starts: one that dies then several times cannot be replaced, and ends the run.
            ready = [one for one in processes(title) if time.time() - one.create_time() > STARTING_S]
            if ready and len(killed) < 6:
                ready[-1].kill()
                killed.append(title)

    found = finish(config_of(tmp_path / "run"), during=kill)
    assert killed, "the run was over before anything was killed"
    assert found.tokens() == whole.tokens()
    assert_same_weights(whole, found)


def test_a_run_that_is_resumed_is_the_run_that_never_stopped(whole: Finished, tmp_path: Path) -> None:
    shutil.copytree(whole.run_dir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "iteration_000004")

    found = finish(config_of(tmp_path / "run").checkpointing(resume="same"))

    assert [result["training_iteration"] for result in found.results] == [3, 4]
    half = len(whole.groups) // 2
    assert found.tokens() == whole.tokens()[half:]
    assert_same_weights(whole, found)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finish(single_turn(tmp_path_factory.mktemp("single") / "run"))


def single_turn(run_dir: Path) -> PPOConfig:
    config = config_of(run_dir).rollouts(max_new_tokens=6).training(iterations=2)
    config.environment(name=None, max_turns=1, max_turn_tokens=None)
    return config


def test_one_turn_of_an_environment_is_a_run_without(single: Finished, tmp_path: Path) -> None:
    config = single_turn(tmp_path / "run").environment(Once, max_turns=1)
    found = finish(config.rewards("rlhf_ray.quickstart.task:reward"))
    assert found.tokens() == single.tokens()
    assert_same_weights(single, found)


def test_asynchronous_turns_never_go_back_to_older_weights(tmp_path: Path) -> None:
    config = GRPOConfig.from_dict(
        {section: values for section, values in config_of(tmp_path / "run").to_dict().items() if section != "algorithm"}
    )
    config.rollouts(max_staleness=2, num_replicas=2, partial_rollouts=True).training(kl_coef=0.0, iterations=3)
    groups: list[ScoredGroup] = []
    algorithm = config.callbacks(on_rollout_group=lambda *, algorithm, group: groups.append(group)).build_algo()
    try:
        for _ in range(3):
            result = algorithm.train()
            assert result["rollouts"]["staleness_max"] <= 2
        evaluated = algorithm.evaluate()
    finally:
        algorithm.stop()
    assert evaluated["quickstart"]["turns_mean"] > 1.0
    spans = [
        [span.version for span in trajectory.version_spans]
        for scored in groups
        for trajectory in scored.group.trajectories
    ]
    assert all(versions == sorted(versions) for versions in spans)


class Hanging(Sums):
    """One group of the first batch hangs."""

    def step(self, action: Any) -> Any:
        """Hang, once the group is known."""
        if getattr(self, "hangs", False):
            time.sleep(3600)
        return super().step(action)

    def reset(self, row: Any, seed: int) -> None:
        """Choose."""
        super().reset(row, seed)
        self.hangs = int(row["answer"]) % 7 == 0


def test_an_environment_that_hangs_costs_its_group_alone(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run").environment(Hanging, step_timeout_s=2.0).training(iterations=1)
    found = finish(config.rewards(max_failures=100))
    failures = {name: value for name, value in found.rows()[0].items() if "/failures/" in name}
    assert failures == {"environment/Hanging/failures/timeout": failures["environment/Hanging/failures/timeout"]}
    assert len(found.groups) == 6
    assert all(int(one.group.prompt.columns["answer"]) % 7 for one in found.groups)
