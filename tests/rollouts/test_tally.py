"""Failures and what environments did, counted between two batches."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

import pytest

from rlhf_ray.config.settings import Settings
from rlhf_ray.errors import RewardError
from rlhf_ray.rollouts.admission import FlowRules
from rlhf_ray.rollouts.tally import Collected, Tally, log_failures
from rlhf_ray.types import EnvironmentStats, RewardFailure

OF_REWARD = RewardFailure(group_id=1, kind="timeout", message="correct took too long")
OF_GUESS = RewardFailure(group_id=2, kind="timeout", message="guess took too long", environment="guess")
OF_SHOP = RewardFailure(group_id=3, kind="raised", message="shop raised", environment="shop")


def make_tally(max_failures: int = 100) -> Tally:
    rules = FlowRules.of(Settings(), greedy_baseline=False)
    return Tally(replace(rules, max_failures=max_failures))


def collected(tally: Tally) -> Collected:
    async def collect() -> Collected:
        tally.begin()
        return tally.collected((), carried=0, spans=())

    return asyncio.run(collect())


def test_failures_of_environments_are_apart_from_those_of_rewards() -> None:
    tally = make_tally()
    for failure in (OF_REWARD, OF_GUESS, OF_GUESS, OF_SHOP):
        tally.failed(failure)

    batch = collected(tally)
    assert batch.failures == {"timeout": 1}
    assert {name: stats.failures for name, stats in batch.environments.items()} == {
        "guess": {"timeout": 2},
        "shop": {"raised": 1},
    }
    assert (collected(tally).failures, collected(tally).environments) == ({}, {})


def test_both_count_toward_the_limit() -> None:
    tally = make_tally(max_failures=2)
    tally.failed(OF_REWARD)
    tally.failed(OF_GUESS)
    expected = r"3 groups .* \(1 timeout, 1 guess: timeout, 1 shop: raised\); .*max_failures = 2. Last: shop raised"
    with pytest.raises(RewardError, match=expected):
        tally.failed(OF_SHOP)


def test_the_first_of_a_kind_and_environment_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    tally = make_tally()
    with caplog.at_level(logging.WARNING, logger="rlhf_ray.rollouts.tally"):
        for failure in (OF_REWARD, OF_GUESS, OF_GUESS):
            tally.failed(failure)
    assert caplog.messages == [
        "group 1 is dropped, its reward failed (timeout): correct took too long",
        "group 2 is dropped, its environment failed (guess: timeout): guess took too long",
    ]


def test_failures_of_an_evaluation_name_their_environment(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="rlhf_ray.rollouts.tally"):
        log_failures([OF_REWARD, OF_GUESS, OF_GUESS])
    assert caplog.messages == [
        "group 1 has no reward (timeout): correct took too long",
        "group 2 has no reward (guess: timeout): guess took too long",
    ]


def test_steps_add_up_until_the_next_batch() -> None:
    tally = make_tally()
    tally.stepped("guess", EnvironmentStats.of_step(0.5, {"distance": 3.0}))
    tally.stepped("shop", EnvironmentStats.of_step(1.0, {}))
    tally.stepped("guess", EnvironmentStats.of_step(0.25, {"distance": 4.0, "hits": 1.0}))

    assert collected(tally).environments == {
        "guess": EnvironmentStats(steps=2, steps_s=0.75, metrics={"distance": (7.0, 2), "hits": (1.0, 1)}),
        "shop": EnvironmentStats(steps=1, steps_s=1.0),
    }
    assert collected(tally).environments == {}
