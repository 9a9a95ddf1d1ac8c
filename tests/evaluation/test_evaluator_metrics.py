from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from rlhf_ray.evaluation.evaluator import evaluation_metrics
from rlhf_ray.reporting.metrics import flatten, held_out_set, metric_for
from rlhf_ray.types import FurtherSequence, RewardFailure, ScoredGroup, Trajectory, Turn

FAILURE = RewardFailure(group_id=3, kind="timeout", message="too slow")

Groups = tuple[ScoredGroup, ...]


@pytest.fixture
def groups(scored: Callable[..., ScoredGroup]) -> Groups:
    return (
        scored(0, [1.0, 0.0, 0.0, 0.0], lengths=[4, 2, 1, 1], truncated=[1]),
        scored(1, [1.0, 1.0, 0.5, 1.5]),
    )


def test_numbers_by_hand(groups: Groups) -> None:
    assert evaluation_metrics([*groups, FAILURE], pass_threshold=1.0) == {
        "reward_mean": pytest.approx(0.625),  # of 0.25 and 1
        "reward_stderr": pytest.approx(0.375),  # sqrt(2 x 0.375^2 / 1) / sqrt(2)
        "pass_at_1": pytest.approx(0.5),  # of 1/4 and 3/4
        "pass_at_2": pytest.approx(0.75),  # of 1/2 and 1
        "pass_at_4": pytest.approx(1.0),
        "num_prompts": 3,
        "failures": 1,
        "completion_tokens_mean": pytest.approx(1.5),
        "truncated_fraction": pytest.approx(0.125),
    }


def test_the_threshold_says_what_passes(groups: Groups) -> None:
    assert evaluation_metrics(groups, pass_threshold=0.5)["pass_at_1"] == pytest.approx(0.625)
    assert evaluation_metrics(groups, pass_threshold=-1.0)["pass_at_1"] == 1.0
    assert evaluation_metrics(groups, pass_threshold=1.6)["pass_at_4"] == 0.0


@pytest.mark.parametrize(("num_samples", "ks"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_powers_of_two_and_all_of_the_samples(
    num_samples: int, ks: list[int], scored: Callable[..., ScoredGroup]
) -> None:
    metrics = evaluation_metrics([scored(0, [0.0] * num_samples)], pass_threshold=1.0)
    assert [key for key in metrics if key.startswith("pass_at_")] == [f"pass_at_{k}" for k in ks]


def test_one_prompt_has_no_standard_error(groups: Groups) -> None:
    assert "reward_stderr" not in evaluation_metrics(groups[:1], pass_threshold=1.0)


def test_where_every_reward_failed_there_is_no_mean() -> None:
    metrics = evaluation_metrics([FAILURE], pass_threshold=1.0)
    assert math.isnan(metrics["reward_mean"])
    assert (metrics["num_prompts"], metrics["failures"]) == (1, 1)
    assert not [key for key in metrics if key.startswith("pass_at_")]


def test_every_key_is_declared(groups: Groups) -> None:
    flat = flatten({"evaluation": {"hard.v2": evaluation_metrics(groups, pass_threshold=1.0)}})
    assert [key for key in flat if metric_for(key) is None] == []
    assert all(isinstance(value, (int, float)) for value in flat.values())


def test_what_reward_functions_log(groups: Groups) -> None:
    logging = [replace(group, logged={"judge": {"hits": [float(i), 1.0]}}) for i, group in enumerate(groups)]
    assert evaluation_metrics([*logging, FAILURE], pass_threshold=1.0)["rewards/judge/hits"] == pytest.approx(0.75)


def test_turns_and_rewards_of_environments(groups: Groups) -> None:
    def of_turns(one: Trajectory, *rewards: float) -> Trajectory:
        turns = tuple(Turn(start=2 * i, end=2 * i + 1, reward=reward) for i, reward in enumerate(rewards))
        tokens = np.zeros(2 * len(rewards), dtype=np.int32)
        return replace(one, token_ids=tokens, sampling_logprobs=tokens.astype(np.float32), turns=turns)

    def played(of: ScoredGroup, name: str, *trajectories: Trajectory) -> ScoredGroup:
        return replace(of, group=replace(of.group, environment=name, trajectories=trajectories))

    one, *others = groups[1].group.trajectories
    later = FurtherSequence(prompt_token_ids=np.zeros(1, dtype=np.int32), trajectory=of_turns(one, 0.5))
    three = replace(of_turns(one, 0.25, 0.25), further=(later,))
    guess = played(groups[1], "guess", three, *others)
    metrics = evaluation_metrics([played(groups[0], "a/b", of_turns(one, -1.0, 1.0)), guess], pass_threshold=1.0)

    assert metrics["turns_mean"] == pytest.approx((2 + 3 + 1 + 1 + 1) / 5)
    assert metrics["environment_reward_mean/guess"] == pytest.approx(0.25)
    assert metrics["environment_reward_mean/a/b"] == 0.0
    # Sampled tokens: half of those of the two that have several turns.
    assert metrics["completion_tokens_mean"] == pytest.approx((2 + 3 + 1 + 1 + 1) / 5)
    flat = flatten({"evaluation": {"set/x": metrics}})
    assert [key for key in flat if metric_for(key) is None] == []
    assert [key for key in flat if held_out_set(key)] == ["evaluation/set/x/reward_mean"]
