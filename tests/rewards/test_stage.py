"""The stage without actors: what it is made of, and how what they answer is added up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest

from rlhf_ray import RewardModelReward
from rlhf_ray.config.settings import RewardSettings
from rlhf_ray.rewards.pool import RewardPool
from rlhf_ray.rewards.reward_model.pool import RewardModelPool
from rlhf_ray.rewards.scoring import Scores
from rlhf_ray.rewards.stage import CombinedRewards, RewardStage, reward_stage
from rlhf_ray.types import RewardFailure, RolloutGroup, ScoredGroup

GroupOf = Callable[..., RolloutGroup]


def stage_of(tokenizer: Any, *functions: Any) -> RewardStage:
    return reward_stage(
        RewardSettings(functions=list(functions)),
        run_id="run",
        tokenizer_path="unused",
        tokenizer=tokenizer,
        trust_remote_code=False,
        num_cpus=0.1,
        on_gpu=False,
    )


class Pool:
    """Answers what it is told to; a pool of functions answers with the group."""

    def __init__(self, outcome: Scores | RewardFailure, *, functions: bool = False) -> None:
        self.workers_replaced = 1
        self.calls: list[str] = []
        self._outcome = outcome
        self._functions = functions

    async def score(self, group: RolloutGroup) -> ScoredGroup | Scores | RewardFailure:
        return self._outcome.of(group) if self._functions and isinstance(self._outcome, Scores) else self._outcome

    def launch(self) -> None:
        self.calls.append("launch")

    def start(self) -> None:
        self.calls.append("start")

    def wait_ready(self) -> None:
        self.calls.append("wait")

    def stop(self) -> None:
        self.calls.append("stop")
        raise RuntimeError("no")


def scores(name: str, weighted: list[float], raw: list[float]) -> Scores:
    return Scores(
        rewards=np.array(weighted, dtype=np.float32),
        rewards_by_function={name: np.array(raw, dtype=np.float32)},
        texts=("a", "b"),
        reward_s=0.5,
    )


def combined(functions: Pool | None, *models: Pool) -> CombinedRewards:
    return CombinedRewards(
        cast(RewardPool, functions),
        cast(list[RewardModelPool], list(models)),
        names=["model", "function"][: 1 + bool(functions)],
    )


def test_functions_alone_need_no_more_than_their_pool(tokenizer: Any) -> None:
    assert isinstance(stage_of(tokenizer, "length"), RewardPool)
    assert isinstance(stage_of(tokenizer, "length", RewardModelReward("rm")), CombinedRewards)
    assert isinstance(stage_of(tokenizer, {"name": "reward_model", "path": "rm"}), CombinedRewards)


def test_what_pools_give_is_added_up_in_the_order_of_the_settings(group_of: GroupOf) -> None:
    functions = Pool(scores("function", [0.0, 1.0], [np.nan, 2.0]), functions=True)
    scored = asyncio.run(combined(functions, Pool(scores("model", [0.5, -3.0], [1.0, -6.0]))).score(group_of()))
    assert isinstance(scored, ScoredGroup)
    assert scored.rewards.tolist() == [0.5, -2.0]
    assert scored.rewards.dtype == np.float32
    assert list(scored.rewards_by_function) == ["model", "function"]
    assert (scored.texts, scored.reward_s) == (("a", "b"), 0.5)


def test_a_failure_of_one_is_a_failure(group_of: GroupOf) -> None:
    failure = RewardFailure(group_id=7, kind="raised", message="bug")
    fine = Pool(scores("model", [1.0, 1.0], [1.0, 1.0]))
    assert asyncio.run(combined(Pool(failure, functions=True), fine).score(group_of())) is failure
    assert asyncio.run(combined(None, fine, Pool(failure)).score(group_of())) is failure


def test_a_sum_beyond_float32_is_a_failure(group_of: GroupOf) -> None:
    big = [3e38, 0.0]
    functions = Pool(scores("function", big, big), functions=True)
    outcome = asyncio.run(combined(functions, Pool(scores("model", big, big))).score(group_of()))
    assert isinstance(outcome, RewardFailure)
    assert outcome.kind == "not_finite"


def test_all_start_side_by_side_and_all_are_stopped_whatever_one_raises(caplog: pytest.LogCaptureFixture) -> None:
    functions, model = Pool(scores("function", [], []), functions=True), Pool(scores("model", [], []))
    stage = combined(functions, model)
    stage.start()
    assert stage.workers_replaced == 2
    stage.stop()
    assert caplog.text.count("reward workers: stopping failed (RuntimeError('no'))") == 2
    assert functions.calls == ["start", "stop"]
    assert model.calls == ["launch", "wait", "stop"]
