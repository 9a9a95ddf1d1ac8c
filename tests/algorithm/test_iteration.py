from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rlhf_ray.algorithm.iteration import Iteration, Stage, iteration_result
from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.learner.packing import plan_update
from rlhf_ray.learner.remote.commands import UpdateResult
from rlhf_ray.reporting.metrics import flatten, metric_for
from rlhf_ray.rollouts.tally import Collected
from rlhf_ray.types import (
    EnvironmentStats,
    FurtherSequence,
    Prompt,
    RolloutGroup,
    ScoredGroup,
    Trajectory,
    Turn,
    VersionSpan,
)
from rlhf_ray.weight_sync.publisher import SyncResult

NAN = float("nan")


def completion(length: int, *spans: tuple[int, int, int], finish_reason: str = "stop") -> Trajectory:
    return Trajectory.single_turn(
        token_ids=np.arange(length, dtype=np.int32),
        sampling_logprobs=np.zeros(length, dtype=np.float32),
        asked_version=0,
        version_spans=tuple(VersionSpan(version=v, start=start, end=end) for v, start, end in spans),
        finish_reason=finish_reason,
    )


def scored(
    group_id: int, prompt_tokens: int, completions: list[Trajectory], rewards: list[float], **by_function: list[float]
) -> ScoredGroup:
    prompt = Prompt(prompt_id=group_id, token_ids=np.arange(prompt_tokens, dtype=np.int32), text="")
    group = RolloutGroup(group_id=group_id, prompt=prompt, trajectories=tuple(completions), replica_id="r")
    return ScoredGroup(
        group=group,
        rewards=np.asarray(rewards, dtype=np.float32),
        rewards_by_function={name: np.asarray(values, dtype=np.float32) for name, values in by_function.items()},
        texts=("",) * len(completions),
        reward_s=0.1,
    )


# The policy is version 5; two completions were begun by version 4.
GROUPS = (
    scored(
        8,
        3,
        [completion(4, (4, 0, 3), (5, 3, 4)), completion(2, (5, 0, 2), finish_reason="length")],
        [1.0, 0.0],
        exact=[1.0, 0.0],
        form=[NAN, 0.5],
    ),
    scored(9, 5, [completion(1, (5, 0, 1)), completion(1, (4, 0, 1))], [2.0, 1.0], exact=[2.0, 1.0], form=[NAN, NAN]),
)
FIGURES = {"policy_loss": -0.5, "entropy": 1.5, "lr": 1e-6, "advantage_s": 0.5, "update_s": 1.5}


def make_result(
    groups: tuple[ScoredGroup, ...] = GROUPS,
    *,
    environments: dict[str, EnvironmentStats] | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    collected = Collected(
        groups=groups,
        failures=Counter(timeout=2, raised=1),
        equal_reward_groups=4,
        carried_groups=2,
        rollout_s=2.0,
        reward_s=0.25,
        generated_tokens=8,
        generating_s=4.0,
        elapsed_s=5.0,
        spans=(),
        environments=environments or {},
    )
    batch = SequenceBatch.from_groups(GROUPS, version=5, max_staleness=1)
    iteration = Iteration(
        version=7,
        stage=Stage.DONE,
        collected=collected,
        batch=batch,
        plan=plan_update(
            batch.lengths.tolist(),
            batch.completion_lengths.tolist(),
            num_minibatches=2,
            num_epochs=1,
            num_ranks=2,
            max_tokens=1,
            attention_length=1536.0,
            packed=False,
            seed=0,
        ),
        update=UpdateResult(metrics=dict(FIGURES)),
        publication=SyncResult(
            version=6, size_bytes=3000, pause_s=0.03, replica_ids=frozenset("ab"), publication_s=0.25
        ),
    )
    return iteration_result(replace(iteration, **overrides), weight_sync_s=0.125, iteration_s=4.5)


def test_rollouts_by_hand() -> None:
    assert make_result()["rollouts"] == {
        "equal_reward_groups": 4,
        "carried_groups": 2,
        "num_groups": 2,
        "num_completions": 4,
        "reward_mean": pytest.approx(1.0),
        "reward_std": pytest.approx(math.sqrt(0.5)),
        # Over completions: 3, 3, 5 and 5.
        "prompt_tokens_mean": pytest.approx(4.0),
        "completion_tokens_mean": pytest.approx(2.0),
        "completion_tokens_max": 4,
        "truncated_fraction": pytest.approx(0.25),
        "tokens_per_s": pytest.approx(8 / 4.0),
        # 4 of 8 tokens are one version old.
        "idle_fraction": pytest.approx(0.2),
        "turns_mean": 1.0,
        "in_loss_fraction": 1.0,
        "staleness_mean": pytest.approx(0.5),
        "staleness_max": 1,
        "staleness_fraction": {"0": 0.5, "1": 0.5},
    }


def test_staleness_is_that_of_tokens_in_the_losses() -> None:
    batch = SequenceBatch.from_groups(GROUPS, version=5, max_staleness=0)
    rollouts = make_result(batch=batch)["rollouts"]

    # The first three of four tokens, and a whole completion of one token, are of version 4.
    assert rollouts["in_loss_fraction"] == 0.5
    assert (rollouts["staleness_mean"], rollouts["staleness_max"]) == (0.0, 0)
    assert rollouts["staleness_fraction"] == {"0": 1.0}

    nothing = make_result(batch=SequenceBatch.from_groups(GROUPS, version=9, max_staleness=0))["rollouts"]
    assert nothing["in_loss_fraction"] == nothing["staleness_mean"] == nothing["staleness_max"] == 0
    assert nothing["staleness_fraction"] == {}


def test_rewards_are_told_by_function_where_it_applies() -> None:
    assert make_result()["rewards"] == {
        "exact": {"mean": pytest.approx(1.0)},
        "form": {"mean": pytest.approx(0.5)},
        "failures": {"timeout": 2, "raised": 1},
    }


def test_a_function_that_never_applies_has_no_mean() -> None:
    silent = (scored(1, 1, [completion(1, (5, 0, 1))], [0.0], form=[NAN]),)
    collected = Collected(
        groups=silent,
        failures=Counter(),
        equal_reward_groups=0,
        carried_groups=0,
        rollout_s=1.0,
        reward_s=0.0,
        generated_tokens=1,
        generating_s=1.0,
        elapsed_s=1.0,
        spans=(),
    )

    rewards = make_result(collected=collected)["rewards"]

    assert math.isnan(rewards["form"]["mean"])
    assert rewards["failures"] == {}


def test_learner_timers_and_weight_sync() -> None:
    result = make_result()

    assert result["learner"] == {
        "policy_loss": -0.5,
        "entropy": 1.5,
        "lr": 1e-6,
        # Prompts of 3, 3, 5, 5 and completions of 4, 2, 1, 1.
        "num_tokens": 24,
        # A budget of one token puts each sequence alone; two minibatches of two over two ranks.
        "num_microbatches": 2,
        "padding_fraction": 0.0,
        "tokens_per_s": pytest.approx(24 / 2.0),
        "idle_fraction": pytest.approx(2.5 / 4.5),
        "policy_version": 7,
    }
    assert result["timers"] == {
        "rollout_s": 2.0,
        "reward_s": 0.25,
        "advantage_s": 0.5,
        "update_s": 1.5,
        "weight_sync_s": 0.125,
        "iteration_s": 4.5,
    }
    assert result["weight_sync"] == {
        "size_bytes": 3000,
        "pause_s": 0.03,
        "publication_s": 0.25,
        "num_replicas": 2,
    }


def test_the_figures_of_the_learners_are_left_as_they_are() -> None:
    figures = dict(FIGURES)

    make_result(update=UpdateResult(metrics=figures))

    assert figures == FIGURES


def test_every_key_is_declared_and_every_value_is_a_number() -> None:
    flat = flatten(make_result())

    assert [key for key in flat if metric_for(key) is None] == []
    assert all(isinstance(value, (int, float)) for value in flat.values())


def test_what_reward_functions_log_is_averaged_over_calls() -> None:
    logging = (
        replace(GROUPS[0], logged={"exact": {"hits": [1.0, 0.0]}}),
        replace(GROUPS[1], logged={"exact": {"hits": [0.5], "tries/all": [3.0]}}),
    )
    flat = flatten(make_result(groups=logging))
    assert flat["rewards/exact/hits"] == pytest.approx(0.5)
    assert flat["rewards/exact/tries/all"] == 3.0
    assert flat["rewards/exact/mean"] == pytest.approx(1.0)
    for key in ("rewards/exact/hits", "evaluation/gsm8k/rewards/exact/hits"):
        declared = metric_for(key)
        assert declared is not None
        assert "log_metric" in declared.formula


def played(name: str, *trajectories: Trajectory) -> ScoredGroup:
    one = scored(1, 3, list(trajectories), [1.0] * len(trajectories))
    return replace(one, group=replace(one.group, environment=name))


def turns(*places: tuple[int, int, float], finish_reason: str = "stop", further: int = 0) -> Trajectory:
    """(start, end, reward) of each turn; so many further sequences of two tokens, one of them sampled for 0.5."""
    of_one = completion(places[-1][1], finish_reason=finish_reason)
    own = tuple(Turn(start=start, end=end, reward=reward) for start, end, reward in places)
    later = replace(completion(2), turns=(Turn(start=0, end=1, reward=0.5),))
    sequences = (FurtherSequence(prompt_token_ids=np.arange(9, dtype=np.int32), trajectory=later),) * further
    return replace(of_one, turns=own, further=sequences)


def test_without_an_environment_there_are_no_metrics_of_one() -> None:
    result = make_result()

    assert "environment" not in result
    assert "observed_tokens_mean" not in result["rollouts"]


def test_a_trajectory_of_several_turns_and_sequences_counts_once() -> None:
    groups = (
        # 3 sampled and 2 observed tokens; then 2 sampled, 1 observed, and 2 further sequences of 1 and 1.
        played("guess", turns((0, 2, 0.0), (4, 5, 1.0)), turns((0, 1, 0.25), (2, 3, 0.0), further=2)),
        played("shop", turns((0, 4, -1.0), finish_reason="turns")),
    )
    result = make_result(groups)

    rollouts = result["rollouts"]
    assert rollouts["num_completions"] == 3
    assert rollouts["turns_mean"] == pytest.approx((2 + 4 + 1) / 3)
    assert rollouts["completion_tokens_mean"] == pytest.approx((3 + 4 + 4) / 3)
    assert rollouts["completion_tokens_max"] == 4
    assert rollouts["observed_tokens_mean"] == pytest.approx((2 + 3 + 0) / 3)
    assert rollouts["prompt_tokens_mean"] == 3.0
    assert rollouts["truncated_fraction"] == pytest.approx(1 / 3)
    assert result["environment"] == {
        "guess": {"reward_mean": pytest.approx((1.0 + 1.25) / 2), "steps_mean": 3.0, "failures": {}},
        "shop": {"reward_mean": -1.0, "steps_mean": 1.0, "failures": {}},
    }


def test_environments_tell_their_steps_metrics_and_failures() -> None:
    stats = EnvironmentStats.of_step(0.5, {"distance": 3.0}) + EnvironmentStats.of_step(0.25, {})
    stats += EnvironmentStats.of_step(0.75, {"distance": 4.0, "hits": 1.0})
    failed = EnvironmentStats(failures={"raised": 1}) + EnvironmentStats(failures={"timeout": 1})
    failed += EnvironmentStats(failures={"timeout": 1})
    result = make_result((played("guess", turns((0, 1, 1.0))),), environments={"guess": stats, "shop": failed})

    assert result["environment"] == {
        "guess": {
            "reward_mean": 1.0,
            "steps_mean": 1.0,
            "step_s": pytest.approx(0.5),
            "distance": pytest.approx(3.5),
            "hits": 1.0,
            "failures": {},
        },
        # None of its groups got into the batch.
        "shop": {"failures": {"raised": 1, "timeout": 2}},
    }
    assert result["rewards"]["failures"] == {"timeout": 2, "raised": 1}
    flat = flatten(result)
    assert flat["environment/shop/failures/timeout"] == 2
    assert [key for key in flat if metric_for(key) is None] == []
    declared = metric_for("environment/guess/distance")
    assert declared is not None
    assert declared.key == "environment/<name>/<metric>"
