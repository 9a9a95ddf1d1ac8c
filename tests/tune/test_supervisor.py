"""What the keeper does with trials that live, die or never come, without Ray and Serve."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import serve

from rlhf_ray.tune import supervisor as module
from rlhf_ray.tune.queue import Room, TrialRoom
from rlhf_ray.tune.supervisor import TrialKeeper

NEED = Room(cpus=1.0, gpus=0.0)


class Bridge:
    """Answers with its state: an error is raised by whoever reads it, ``...`` is no answer yet."""

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
def keeper(deleted: list[str]) -> TrialKeeper:
    """A keeper of eight CPUs that looks after its trials only when told to."""
    keeper: TrialKeeper = object.__new__(TrialKeeper)
    keeper._lock = threading.Lock()
    keeper._room = TrialRoom(lambda: Room(cpus=8.0, gpus=0.0))
    keeper._unwatched, keeper._watched, keeper._closed = {}, {}, False
    return keeper


def started(keeper: TrialKeeper, trial: str, bridge: Bridge) -> None:
    answer = keeper.ask(trial, NEED)
    assert answer is not None
    assert answer.granted
    keeper.watch(trial, f"{trial}-rollout", bridge)
    keeper.started(trial)


def test_the_application_of_a_dead_trial_alone_is_deleted(keeper: TrialKeeper, deleted: list[str]) -> None:
    dead, alive, busy = Bridge(ray.exceptions.ActorDiedError()), Bridge(), Bridge(...)
    away = Bridge(ray.exceptions.ActorUnavailableError("no connection", None))
    for trial, bridge in {"dead": dead, "alive": alive, "busy": busy, "away": away}.items():
        started(keeper, trial, bridge)
    keeper._clear_away()
    keeper._clear_away()
    assert deleted == ["dead-rollout"]
    # One that answers is asked again; one that has not answered yet is not.
    assert (dead.pings, alive.pings, busy.pings, away.pings) == (1, 3, 1, 3)
    for trial in ("alive", "busy", "away"):
        keeper.leave(trial)
    assert keeper._room.is_empty()


def test_the_learners_group_is_removed_too_as_it_was_last_seen(keeper: TrialKeeper, deleted: list[str]) -> None:
    bridge = Bridge()
    started(keeper, "a", bridge)
    for state in (None, "group 1", "group 2", None):  # The last: a bridge that was started again knows of none.
        bridge.state = state
        keeper._clear_away()
    assert deleted == []
    bridge.state = ray.exceptions.ActorDiedError()
    keeper._clear_away()
    keeper._clear_away()
    assert deleted == ["group 2", "a-rollout"]


def test_a_failing_delete_keeps_nobody_from_the_others(
    keeper: TrialKeeper, deleted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def delete(name: str) -> None:
        deleted.append(name)
        raise RuntimeError("no Serve")

    monkeypatch.setattr(serve, "delete", delete)
    for trial in ("a", "b"):
        started(keeper, trial, Bridge(ray.exceptions.ActorDiedError()))
    keeper._clear_away()
    assert deleted == ["a-rollout", "b-rollout"]
    assert keeper._room.is_empty()


def test_a_group_that_cannot_be_removed_keeps_no_application(
    keeper: TrialKeeper, deleted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove(group: str) -> None:
        raise RuntimeError("no such group")

    monkeypatch.setattr(module, "remove_placement_group", remove)
    bridge = Bridge("group")
    started(keeper, "a", bridge)
    keeper._clear_away()
    bridge.state = ray.exceptions.ActorDiedError()
    keeper._clear_away()
    assert deleted == ["a-rollout"]
    assert keeper._room.is_empty()


def test_a_trial_that_leaves_is_not_asked_after(keeper: TrialKeeper, deleted: list[str]) -> None:
    bridge = Bridge(ray.exceptions.ActorDiedError())
    started(keeper, "a", bridge)
    keeper.leave("a")
    keeper._clear_away()
    assert deleted == []


def test_one_that_died_between_permission_and_start_gives_its_room_back(
    keeper: TrialKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper.ask("a", NEED)
    keeper._clear_away()
    assert not keeper._room.is_empty()
    now = module.time.monotonic()
    monkeypatch.setattr(module.time, "monotonic", lambda: now + 121)
    keeper._clear_away()
    assert keeper._room.is_empty()


def test_a_keeper_that_ends_sends_trials_to_the_next_one(keeper: TrialKeeper) -> None:
    keeper._closed = True
    assert keeper.ask("a", NEED) is None
