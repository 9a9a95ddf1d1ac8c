"""The lease against a keeper that answers what a test says, without Ray."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from rlhf_ray.errors import ConfigError
from rlhf_ray.tune import reservation as trial_lease
from rlhf_ray.tune.queue import Answer, Room
from rlhf_ray.tune.reservation import TrialLease

NEED, LITTLE = Room(cpus=3.0, gpus=0.0), Room(cpus=0.5, gpus=0.0)


def waiting(*, others: int = 1, is_next: bool = True, free: Room = LITTLE) -> Answer:
    return Answer(granted=False, free=free, others=others, is_next=is_next)


GRANTED = Answer(granted=True, free=NEED, others=0, is_next=True)


class FakeKeeper:
    """Gives its answers in turn and remembers what it was asked and told."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[Room] = []
        self.told: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        def call(trial: str, *arguments: Any) -> Any:
            if name == "ask":
                self.asked.append(*arguments)
                return self.answers.pop(0)
            self.told.append((name, *arguments))
            return None

        return SimpleNamespace(remote=call)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Time passes only while a lease waits; the actor's answers come at once, and an exception is raised."""

    def get(answer: Any, timeout: float) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    now = [100.0]
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(trial_lease.time, "monotonic", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def refuse(free: Room) -> Room:
    raise ConfigError("resources.cpus_per_replica", 3.0, f"only {free} are free")


def lease(keeper: FakeKeeper, clock: Callable[[float], None], reduced: Callable[[Room], Room] = refuse) -> TrialLease:
    return TrialLease(lambda: keeper, need=NEED, reduced=reduced, patience_s=3.0, wait=clock)


def test_a_lease_is_told_of_to_its_end(clock: Callable[[float], None]) -> None:
    keeper = FakeKeeper(GRANTED)
    held = lease(keeper, clock)
    held.watch("PPO-rollout", "bridge")
    held.started()
    held.end()
    assert (held.room, keeper.asked) == (NEED, [NEED])
    assert keeper.told == [("watch", "PPO-rollout", "bridge"), ("started",), ("leave",)]


def test_beside_others_a_trial_waits_for_all_it_needs_and_says_so_once(
    clock: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    keeper = FakeKeeper(*[waiting(others=2)] * 20, GRANTED)
    with caplog.at_level(logging.WARNING, logger="rlhf_ray"):
        assert lease(keeper, clock, reduced=lambda free: LITTLE).room == NEED
    assert keeper.asked == [NEED] * 21
    (record,) = caplog.records
    assert "need 3 CPUs, 0.5 CPUs are free, and 2 other trials run" in record.getMessage()
    assert "max_concurrent_trials" in record.getMessage()


def test_a_short_wait_is_not_worth_a_word(clock: Callable[[float], None], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="rlhf_ray"):
        lease(FakeKeeper(waiting(), waiting(), GRANTED), clock)
    assert caplog.records == []


def test_alone_a_trial_makes_do_with_what_is_free(clock: Callable[[float], None]) -> None:
    keeper = FakeKeeper(waiting(others=0), GRANTED)
    assert lease(keeper, clock, reduced=lambda free: free).room == LITTLE
    assert keeper.asked == [NEED, LITTLE]


def test_what_it_would_make_do_with_is_forgotten_when_another_trial_is_first(clock: Callable[[float], None]) -> None:
    keeper = FakeKeeper(waiting(others=0), waiting(others=1), GRANTED)
    assert lease(keeper, clock, reduced=lambda free: free).room == NEED


def test_alone_without_room_is_an_error_in_the_end_and_not_at_once(clock: Callable[[float], None]) -> None:
    keeper = FakeKeeper(*[waiting(others=0)] * 10)
    with pytest.raises(ConfigError, match=r"0\.5 CPUs are free.*max_concurrent_trials"):
        lease(keeper, clock)
    assert len(keeper.asked) == 5
    # Behind another trial that waits too it is not alone.
    keeper = FakeKeeper(*[waiting(others=0, is_next=False)] * 10, GRANTED)
    assert lease(keeper, clock).room == NEED


def test_a_keeper_that_ends_is_followed_by_a_new_one(clock: Callable[[float], None]) -> None:
    old = FakeKeeper(None)
    gone = FakeKeeper(ray.exceptions.RayActorError())
    new = FakeKeeper(GRANTED)
    keepers = iter([old, gone, new])
    held = TrialLease(lambda: next(keepers), need=NEED, reduced=refuse, patience_s=3.0, wait=clock)
    held.end()
    assert new.told == [("leave",)]


def test_a_keeper_that_is_gone_at_the_end_costs_no_trial(
    clock: Callable[[float], None], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = lease(FakeKeeper(GRANTED), clock)

    def get(answer: Any, timeout: float) -> Any:
        raise ray.exceptions.RayActorError()

    monkeypatch.setattr(ray, "get", get)
    with caplog.at_level(logging.WARNING, logger="rlhf_ray"):
        held.end()
    assert "is gone" in caplog.text
