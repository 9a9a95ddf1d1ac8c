"""A Ray Tune sweep on the real stack: trials side by side, weights that are taken over, one that is killed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray import tune
from ray.tune.schedulers import PopulationBasedTraining

from rlhf_ray import PPO, PPOConfig

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def four_cpus() -> Iterator[None]:
    """The session's Ray, or a new one where another module has shut that down."""
    was_there = ray.is_initialized()
    if not was_there:
        ray.init(num_cpus=4, log_to_driver=False, namespace="rlhf_ray")
    yield
    if not was_there:
        ray.shutdown()


def small_space() -> dict[str, Any]:
    """Sections and dotted names of a quickstart run that shares four CPUs with another one."""
    return {
        "data.batch_size": 8,
        "rollouts": {"group_size": 4, "max_prompt_tokens": 16, "num_threads": 1},
        "learners": {"num_threads": 1, "max_tokens_per_microbatch": 256},
        "training": {"iterations": 4, "num_minibatches": 2, "lr_schedule": "constant"},
        "evaluation": {"interval": 3, "num_prompts": 16},
        "reporting.tensorboard": False,
        "resources": {"cpus_per_replica": 0.5, "cpus_per_learner": 0.5, "cpus_per_reward_worker": 0.1},
    }


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def run_dir_of(result: tune.Result) -> Path:
    (metrics,) = Path(result.path).glob("*/metrics.jsonl")
    return metrics.parent


def rates(result: tune.Result) -> list[float]:
    """The learning rate of each iteration of a trial; none is missing or there twice, and all are exact."""
    lines = rows(run_dir_of(result))
    assert [line["training_iteration"] for line in lines] == list(range(1, len(lines) + 1))
    assert [line["learner/policy_version"] for line in lines] == list(range(1, len(lines) + 1))
    assert all(line["learner/sampling_logprob_diff_max"] < 1e-3 for line in lines)
    assert all(0 < line["evaluation/quickstart/reward_mean"] <= 1 for line in lines)
    return [float(f"{line['learner/lr']:.6g}") for line in lines]


def test_a_grid_of_two_trials_in_a_plain_dictionary(leftovers: Any, tmp_path: Path) -> None:
    grid, space = [1e-5, 1e-4], small_space()
    space["training"] |= {"lr": tune.grid_search(grid), "iterations": 2}
    results = tune.Tuner(
        "PPO",
        param_space=space,
        tune_config=tune.TuneConfig(max_concurrent_trials=2),
        run_config=tune.RunConfig(name="grid", storage_path=str(tmp_path), verbose=0),
    ).fit()

    assert results.num_errors == 0
    found = sorted(results, key=lambda result: rates(result)[0])
    assert [rates(result) for result in found] == [[lr] * 2 for lr in grid]
    first, second = (rows(run_dir_of(result))[0] for result in found)
    # The same prompts and samples until a learning rate has had an effect.
    assert first["rollouts/reward_mean"] == second["rollouts/reward_mean"]
    leftovers.assert_none()


def test_a_population_in_which_one_trial_is_killed(leftovers: Any, tmp_path: Path) -> None:
    first, mutated = {1e-5, 2e-5}, {1e-4, 3e-4}

    def die(*, algorithm: Any, result: dict[str, Any]) -> None:
        if algorithm.settings.training.lr in mutated and algorithm.iteration == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    space = PPOConfig.from_dict(small_space()).training(lr=tune.grid_search(sorted(first)))
    tuner = tune.Tuner(
        PPO,
        param_space=space.callbacks(on_train_result=die),
        tune_config=tune.TuneConfig(
            metric="evaluation/quickstart/reward_mean",
            mode="max",
            max_concurrent_trials=2,
            scheduler=PopulationBasedTraining(
                time_attr="training_iteration",
                perturbation_interval=2,
                quantile_fraction=0.5,
                hyperparam_mutations={"training": {"lr": sorted(mutated)}},
                # Nobody runs ahead, so that the worse of the two takes over the other's weights for sure.
                synch=True,
            ),
        ),
        run_config=tune.RunConfig(name="population", storage_path=str(tmp_path), verbose=0),
    )
    results = tuner.fit()

    assert results.num_errors == 1
    better, worse = sorted(results, key=lambda result: result.error is not None)
    assert (better.metrics or {})["evaluation"]["quickstart"]["num_prompts"] == 16
    assert rates(better) == [better.config["training"]["lr"]] * 4
    # It went on from the other's second policy; its new rate wins over the one in the optimizer state restored.
    *before, after = rates(worse)
    assert after == worse.config["training"]["lr"]
    assert after in mutated
    assert len(before) == 2
    assert set(before) <= first
    assert yaml.safe_load((run_dir_of(worse) / "config.yaml").read_text())["training"]["lr"] == after
    leftovers.assert_none()
    assert ray.is_initialized()
