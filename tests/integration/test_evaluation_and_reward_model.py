"""A run that trains on a reward model beside a function, and measures itself on two sets, on the real stack."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from ray.util.state import list_actors

from rlhf_ray import PPOConfig, RewardModelReward
from rlhf_ray.algorithm.algorithm import Algorithm
from rlhf_ray.quickstart import model_path
from rlhf_ray.quickstart.task import eval_rows, train_rows
from rlhf_ray.reporting.metrics import flatten, metric_for
from rlhf_ray.types import ScoredGroup

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("cluster")]

ITERATIONS = 3


def told(completions: Any, trainer_state: Any, log_extra: Any = None, log_metric: Any = None, **kwargs: Any) -> Any:
    """As one writes it for TRL; adds nothing to the sum."""
    log_metric("step", trainer_state.global_step)
    log_metric("epoch", trainer_state.epoch)
    log_extra("last_step", [trainer_state.max_steps] * len(completions))
    return [1.0] * len(completions)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> RewardModelReward:
    """The quickstart model with a new head."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("reward-model")
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(model_path(), num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_path()).save_pretrained(folder)
    return RewardModelReward(str(folder))


@pytest.fixture(scope="module")
def algorithm(
    small: Callable[[Path], PPOConfig], reward_model: RewardModelReward, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Algorithm]:
    folder = tmp_path_factory.mktemp("sets")
    sets = {"held_out": eval_rows()[:12], "seen": train_rows()[:8]}
    for name, rows in sets.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    algorithm = (
        small(folder / "run")
        .data(eval_path={name: str(folder / f"{name}.jsonl") for name in sets})
        .rollouts(num_replicas=1)
        .learners(num_learners=1)
        .rewards(reward_model, "rlhf_ray.quickstart.task:reward", told, weights=[0.5, 1.0, 0.0])
        # Without a critic, so that there is none to wait for.
        .training(iterations=ITERATIONS, advantage="rloo")
        .evaluation(interval=2, at_start=True, at_end=True, samples_per_prompt=4, temperature=1.0)
        .reporting(wandb_project=None)
        .build_algo()
    )
    yield algorithm
    algorithm.stop()


@pytest.fixture(scope="module")
def results(algorithm: Algorithm) -> list[dict[str, Any]]:
    return [algorithm.train() for _ in range(ITERATIONS)]


def test_the_run_measures_itself_at_start_at_the_interval_and_once_at_the_end(
    algorithm: Algorithm, results: list[dict[str, Any]]
) -> None:
    rows = [json.loads(line) for line in (algorithm.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["training_iteration"] for row in rows] == [0, 1, 2, 3]
    assert ["evaluation/seen/reward_mean" in row for row in rows] == [True, False, True, True]
    assert not any("learner/value_loss" in row for row in rows)
    assert [set(result.get("evaluation", {})) for result in results] == [
        set(),
        {"held_out", "seen"},
        {"held_out", "seen"},
    ]
    of_set = results[-1]["evaluation"]["held_out"]
    assert (of_set["num_prompts"], of_set["failures"]) == (12, 0)
    assert of_set["pass_at_1"] <= of_set["pass_at_2"] <= of_set["pass_at_4"]
    assert [key for row in rows for key in row if metric_for(key) is None] == []


def test_samples_are_those_of_the_policy_as_it_is_and_come_again(
    algorithm: Algorithm, results: list[dict[str, Any]]
) -> None:
    assert algorithm.evaluate() == results[-1]["evaluation"]
    scored = algorithm.sample_evaluation()
    assert [len(one.group.trajectories) for one in scored if isinstance(one, ScoredGroup)] == [4] * 20
    spans = [
        s for one in scored if isinstance(one, ScoredGroup) for c in one.group.trajectories for s in c.version_spans
    ]
    assert {span.version for span in spans} == {algorithm.policy_version}


def test_rewards_are_the_sum_of_model_and_function(
    algorithm: Algorithm, results: list[dict[str, Any]], reward_model: RewardModelReward
) -> None:
    for result in results:
        parts = result["rewards"]
        total = 0.5 * parts["reward_model"]["mean"] + parts["reward"]["mean"]
        assert result["rollouts"]["reward_mean"] == pytest.approx(total, abs=1e-4)
        assert [key for key in flatten(result) if metric_for(key) is None] == []
    scored = algorithm.sample_evaluation()[0]
    assert isinstance(scored, ScoredGroup)
    here = reward_model(prompts=[scored.group.prompt.text] * 4, completions=scored.texts)
    np.testing.assert_allclose(scored.rewards_by_function["reward_model"], here, atol=1e-4)


def test_the_resolved_configuration_names_the_reward_model(
    algorithm: Algorithm, reward_model: RewardModelReward
) -> None:
    resolved = PPOConfig.from_yaml(algorithm.run_dir / "config.yaml").settings.rewards.functions
    assert resolved[:2] == [reward_model.to_spec(), "rlhf_ray.quickstart.task:reward"]


def test_a_function_is_told_of_the_training_and_what_it_logs_is_reported(
    algorithm: Algorithm, results: list[dict[str, Any]]
) -> None:
    # Two optimizer steps and 12 prompts an iteration.
    assert [result["rewards"]["told"]["step"] for result in results] == [0.0, 2.0, 4.0]
    epochs = [12 * version / len(train_rows()) for version in range(ITERATIONS)]
    assert [result["rewards"]["told"]["epoch"] for result in results] == pytest.approx(epochs)
    assert results[-1]["evaluation"]["seen"]["rewards/told/step"] == 2.0 * ITERATIONS
    table = pq.read_table(algorithm.run_dir / "completions" / "step_000003.parquet")
    assert set(table.column("extra/told/last_step").to_pylist()) == {2 * ITERATIONS}


def test_the_reward_models_actor_ends_with_the_run(algorithm: Algorithm, results: list[dict[str, Any]]) -> None:
    def actors() -> list[str]:
        alive = list_actors(filters=[("state", "=", "ALIVE")], limit=1000)
        return [actor.name for actor in alive if actor.name and "reward_model" in actor.name]

    assert len(actors()) == 1
    algorithm.stop()
    assert actors() == []
