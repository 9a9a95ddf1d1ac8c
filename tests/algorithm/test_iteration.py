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
from rlhf_ray.types import Prompt, RolloutGroup, ScoredGroup, Trajectory, VersionSpan
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
    groups: tuple[ScoredGroup, ...] = GROUPS, *, iteration_s: float = 4.5, **overrides: Any
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
