"""What the supervisor does with trials that live, die or never come, without Ray and Serve."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import serve

from rlhf_ray.tune import supervisor as module
from rlhf_ray.tune.supervisor import Resources, Supervisor, TrialQueue

NEED = Resources(cpus=1.0, gpus=0.0)


class Bridge:
    """Answers with its state: an error is raised where it is read, ``...`` is no answer yet."""

    def __init__(self, state: Any = None) -> None:
        self.state = state
        self.pings = 0
        self.placement_group = SimpleNamespace(remote=self._ping)

    def _ping(self) -> Bridge:
        self.pings += 1
        return self


@pytest.fixture
def deleted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Serve applications and placement groups that were removed."""

    def get(bridge: Bridge) -> Any:
        if isinstance(bridge.state, Exception):
            raise bridge.state
        return bridge.state

    names: list[str] = []
    monkeypatch.setattr(ray, "wait", lambda pings, timeout: ([p for p in pings if p.state is not ...], []))
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(serve, "delete", names.append)
    monkeypatch.setattr(module, "remove_placement_group", names.append)
    return names


@pytest.fixture
def supervisor(deleted: list[str]) -> Supervisor:
    """A supervisor of eight CPUs that looks after its trials only when told to."""
    supervisor: Supervisor = object.__new__(Supervisor)
    supervisor._lock = threading.Lock()
    supervisor._queue = TrialQueue(lambda: Resources(cpus=8.0, gpus=0.0))
    supervisor._closed = False
    return supervisor


def started(supervisor: Supervisor, trial: str, bridge: Bridge) -> None:
    answer = supervisor.ask(trial, NEED)
    assert answer is not None
    assert answer.granted
    supervisor.watch(trial, f"{trial}-rollout", bridge)
    supervisor.started(trial)


def test_the_application_of_a_dead_trial_alone_is_deleted(supervisor: Supervisor, deleted: list[str]) -> None:
    dead, alive, busy = Bridge(ray.exceptions.ActorDiedError()), Bridge(), Bridge(...)
    away = Bridge(ray.exceptions.ActorUnavailableError("no connection", None))
    for trial, bridge in {"dead": dead, "alive": alive, "busy": busy, "away": away}.items():
        started(supervisor, trial, bridge)
    supervisor._clear_away()
    supervisor._clear_away()
    assert deleted == ["dead-rollout"]
    # One that answers is asked again; one that has not answered yet is not.
    assert (dead.pings, alive.pings, busy.pings, away.pings) == (1, 3, 1, 3)
    for trial in ("alive", "busy", "away"):
        supervisor.leave(trial)
    assert supervisor._queue.is_empty()


def test_the_learners_group_is_removed_too_as_it_was_last_seen(supervisor: Supervisor, deleted: list[str]) -> None:
    bridge = Bridge()
    started(supervisor, "a", bridge)
    for state in (None, "group 1", "group 2", None):  # The last: a bridge that was started again knows of none.
        bridge.state = state
        supervisor._clear_away()
    assert deleted == []
    bridge.state = ray.exceptions.ActorDiedError()
    supervisor._clear_away()
    supervisor._clear_away()
    assert deleted == ["group 2", "a-rollout"]


def test_a_failing_delete_does_not_stop_the_others(
    supervisor: Supervisor, deleted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def delete(name: str) -> None:
        deleted.append(name)
        raise RuntimeError("no Serve")

    monkeypatch.setattr(serve, "delete", delete)
    for trial in ("a", "b"):
        started(supervisor, trial, Bridge(ray.exceptions.ActorDiedError()))
    supervisor._clear_away()
    assert deleted == ["a-rollout", "b-rollout"]
    assert supervisor._queue.is_empty()


def test_a_group_that_cannot_be_removed_keeps_no_application(
    supervisor: Supervisor, deleted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove(group: str) -> None:
        raise RuntimeError("no such group")

    monkeypatch.setattr(module, "remove_placement_group", remove)
    bridge = Bridge("group")
    started(supervisor, "a", bridge)
    supervisor._clear_away()
    bridge.state = ray.exceptions.ActorDiedError()
    supervisor._clear_away()
    assert deleted == ["a-rollout"]
    assert supervisor._queue.is_empty()


def test_a_trial_that_leaves_is_not_watched(supervisor: Supervisor, deleted: list[str]) -> None:
    bridge = Bridge(ray.exceptions.ActorDiedError())
    started(supervisor, "a", bridge)
    supervisor.leave("a")
    supervisor._clear_away()
    assert deleted == []


def test_one_that_died_between_permission_and_start_gives_its_queue_back(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor.ask("a", NEED)
    supervisor._clear_away()
    assert not supervisor._queue.is_empty()
    now = time.monotonic()
    monkeypatch.setattr(supervisor._queue, "_clock", lambda: now + 121)
    supervisor._clear_away()
    assert supervisor._queue.is_empty()


def test_a_supervisor_that_ends_sends_trials_to_the_next_one(supervisor: Supervisor) -> None:
    supervisor._closed = True
    assert supervisor.ask("a", NEED) is None
