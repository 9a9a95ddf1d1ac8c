"""The reservation against a supervisor that answers what a test says, without Ray."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from rlhf_ray.errors import ConfigError
from rlhf_ray.tune import reservation as module
from rlhf_ray.tune.reservation import Reservation
from rlhf_ray.tune.supervisor import Answer, Resources

NEED, LITTLE = Resources(cpus=3.0, gpus=0.0), Resources(cpus=0.5, gpus=0.0)


def waiting(*, others: int = 1, is_next: bool = True, free: Resources = LITTLE) -> Answer:
    return Answer(granted=False, free=free, others=others, is_next=is_next)


GRANTED = Answer(granted=True, free=NEED, others=0, is_next=True)


class FakeSupervisor:
    """Gives its answers in turn and remembers what it was asked and told."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[Resources] = []
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
    """Time passes only while a reservation waits; the actor's answers come at once, and an exception is raised."""

    def get(answer: Any, timeout: float) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    now = [100.0]
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def refuse(free: Resources) -> Resources:
    raise ConfigError("resources.cpus_per_replica", 3.0, f"only {free} are free")


def reserve(
    supervisor: FakeSupervisor, clock: Callable[[float], None], reduced: Callable[[Resources], Resources] = refuse
) -> Reservation:
    return Reservation(lambda: supervisor, need=NEED, reduced=reduced, patience_s=3.0, wait=clock)


def test_a_reservation_is_told_of_to_its_end(clock: Callable[[float], None]) -> None:
    supervisor = FakeSupervisor(GRANTED)
    held = reserve(supervisor, clock)
    held.watch("PPO-rollout", "bridge")
    held.started()
    held.end()
    assert (held.resources, supervisor.asked) == (NEED, [NEED])
    assert supervisor.told == [("watch", "PPO-rollout", "bridge"), ("started",), ("leave",)]


def test_beside_others_a_trial_waits_for_all_it_needs_and_says_so_once(
    clock: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    supervisor = FakeSupervisor(*[waiting(others=2)] * 20, GRANTED)
    with caplog.at_level(logging.WARNING, logger="rlhf_ray"):
        assert reserve(supervisor, clock, reduced=lambda free: LITTLE).resources == NEED
    assert supervisor.asked == [NEED] * 21
    (record,) = caplog.records
    assert "need 3 CPUs, 0.5 CPUs are free, and 2 other trials run" in record.getMessage()
    assert "max_concurrent_trials" in record.getMessage()


def test_a_short_wait_is_not_worth_a_word(clock: Callable[[float], None], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="rlhf_ray"):
        reserve(FakeSupervisor(waiting(), waiting(), GRANTED), clock)
    assert caplog.records == []


def test_alone_a_trial_makes_do_with_what_is_free(clock: Callable[[float], None]) -> None:
    supervisor = FakeSupervisor(waiting(others=0), GRANTED)
    assert reserve(supervisor, clock, reduced=lambda free: free).resources == LITTLE
    assert supervisor.asked == [NEED, LITTLE]


def test_a_reduced_need_is_forgotten_when_another_trial_is_first(clock: Callable[[float], None]) -> None:
    supervisor = FakeSupervisor(waiting(others=0), waiting(others=1), GRANTED)
    assert reserve(supervisor, clock, reduced=lambda free: free).resources == NEED


def test_alone_without_resources_is_an_error_in_the_end_and_not_at_once(clock: Callable[[float], None]) -> None:
    supervisor = FakeSupervisor(*[waiting(others=0)] * 10)
    with pytest.raises(ConfigError, match=r"0\.5 CPUs are free.*max_concurrent_trials"):
        reserve(supervisor, clock)
    assert len(supervisor.asked) == 5
    # Behind another trial that waits too it is not alone.
    supervisor = FakeSupervisor(*[waiting(others=0, is_next=False)] * 10, GRANTED)
    assert reserve(supervisor, clock).resources == NEED


def test_a_supervisor_that_ends_is_followed_by_a_new_one(clock: Callable[[float], None]) -> None:
    old = FakeSupervisor(None)
    gone = FakeSupervisor(ray.exceptions.RayActorError())
    new = FakeSupervisor(GRANTED)
    supervisors = iter([old, gone, new])
    held = Reservation(lambda: next(supervisors), need=NEED, reduced=refuse, patience_s=3.0, wait=clock)
    held.end()
    assert new.told == [("leave",)]


def test_a_supervisor_that_is_gone_at_the_end_costs_no_trial(
    clock: Callable[[float], None], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = reserve(FakeSupervisor(GRANTED), clock)

    def get(answer: Any, timeout: float) -> Any:
        raise ray.exceptions.RayActorError()

    monkeypatch.setattr(ray, "get", get)
    with caplog.at_level(logging.WARNING, logger="rlhf_ray"):
        held.end()
    assert "is gone" in caplog.text
