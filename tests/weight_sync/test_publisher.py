from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, OwnerDiedError, RayActorError, RayTaskError

from rlhf_ray.errors import WeightSyncError
from rlhf_ray.types import LoadReport
from rlhf_ray.weight_sync.manifest import BucketLayout, ReplicaFailure, WeightManifest
from rlhf_ray.weight_sync.publisher import DirectPublisher, ObjectStorePublisher, checked_pause

Answer = LoadReport | BaseException


def report(name: str = "r0", version: int = 1, pause_s: float = 0.25) -> LoadReport:
    return LoadReport(replica_id=name, version=version, pause_s=pause_s)


class Broadcast:
    """What a Serve handle's broadcast returns."""

    def __init__(self, answers: Sequence[Answer] | TimeoutError) -> None:
        self._answers = answers

    def results(self, *, timeout_s: float, return_exceptions: bool) -> list[Answer]:
        assert timeout_s > 0
        assert return_exceptions
        if isinstance(self._answers, TimeoutError):
            raise self._answers
        return list(self._answers)


class Handle:
    """A Serve handle whose replicas answer each broadcast with the next of the given lists."""

    def __init__(self, *answers: Sequence[Answer] | TimeoutError) -> None:
        self._answers = list(answers)
        self.asked: list[tuple[Any, ...]] = []

    def broadcast(self, method: str, *arguments: Any) -> Broadcast:
        self.asked.append((method, *arguments))
        return Broadcast(self._answers.pop(0))


class Learners:
    """A learner group that has one version to give."""

    def __init__(self, version: int = 1, deaths: int = 0) -> None:
        self.deaths = deaths
        """How many times they die while they send."""
        bucket = BucketLayout(size_bytes=640, tensors=())
        self.manifest = WeightManifest(version=version, publication="p", buckets=(bucket, bucket))
        self.sent_to: list[tuple[str, ...]] = []
        self.staged = 0
        self.attended = 0
        self.told: list[list[ReplicaFailure]] = []
        """What replicas say of failures, look by look."""

    def take_replica_failures(self) -> list[ReplicaFailure]:
        return self.told.pop(0) if self.told else []

    def restore_restarted_ranks(self) -> None:
        self.attended += 1

    def publish(self) -> tuple[WeightManifest, list[Any]]:
        return self.manifest, ["ref 0", "ref 1"]

    def stage(self) -> None:
        assert self.staged == len(self.sent_to)
        self.staged += 1

    def send(self, replica_ids: tuple[str, ...]) -> int | None:
        assert self.staged == len(self.sent_to) + 1, "what died had it"
        self.sent_to.append(replica_ids)
        return None if len(self.sent_to) <= self.deaths else 999


# What the replicas acknowledge.


def test_longest_pause_of_all_replicas() -> None:
    assert checked_pause(1, [report("a", pause_s=0.1), report("b", pause_s=0.7), report("c", pause_s=0.2)]) == 0.7


@pytest.mark.parametrize("death", [RayActorError(), ActorDiedError()])
def test_a_replica_that_died_is_serves_to_replace(death: BaseException) -> None:
    assert checked_pause(1, [death, report(pause_s=0.5)]) == 0.5


@pytest.mark.parametrize("answers", [[], [RayActorError()]])
def test_a_pool_of_which_nobody_answers_is_an_error(answers: list[Answer]) -> None:
    with pytest.raises(WeightSyncError, match="no replica acknowledged policy version 4"):
        checked_pause(4, answers)


@pytest.mark.parametrize("answers", [[report("a"), ValueError("shape mismatch")], [ValueError("shape mismatch")]])
def test_a_replica_that_could_not_load_is_an_error(answers: list[Answer]) -> None:
    with pytest.raises(WeightSyncError, match=r"policy version 1: ValueError\('shape mismatch'\)"):
        checked_pause(1, answers)


@pytest.mark.parametrize("served", [0, 1])
def test_a_replica_that_serves_another_version_is_an_error(served: int) -> None:
    with pytest.raises(WeightSyncError, match=f"replica b serves version {served} after version 2"):
        checked_pause(2, [report("a", version=2), report("b", version=served)])


# Through the object store.


def test_object_store_publication() -> None:
    learners, handle = Learners(), Handle([report("a", pause_s=0.1), report("b", pause_s=0.3)])

    publication = ObjectStorePublisher(source=learners, handle=handle).gather(1)()

    assert handle.asked == [("load_weights", learners.manifest, ["ref 0", "ref 1"], None)]
    assert publication.version == 1
    assert publication.size_bytes == 1280
    assert publication.pause_s == 0.3
    assert len(publication.replica_ids) == 2
    assert publication.publication_s >= 0.0


def test_replicas_load_in_turn_where_few_may_pause_at_once() -> None:
    learners = Learners()
    before = [report(name, version=0) for name in ("c", "a", "b")]
    # Replica d came meanwhile.
    after = [report(name) for name in ("a", "b", "c", "d")]
    handle = Handle(before, before, before, after)

    publication = ObjectStorePublisher(source=learners, handle=handle, max_paused=2).gather(1)()

    parts = [arguments[3] for arguments in handle.asked[1:]]
    assert handle.asked[0] == ("status",)
    assert parts == [{"a", "b"}, {"c"}, None]
    assert len(publication.replica_ids) == 4


def test_nothing_is_sent_before_it_is_asked_for() -> None:
    handle = Handle([report("a")])
    deliver = ObjectStorePublisher(source=Learners(), handle=handle).gather(1)
    assert handle.asked == []
    assert deliver().replica_ids == {"a"}


def test_a_dead_replica_has_acknowledged_nothing() -> None:
    handle = Handle([report("a"), RayActorError()])

    assert ObjectStorePublisher(source=Learners(), handle=handle).gather(1)().replica_ids == {"a"}


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("nobody", [[], [RayActorError()]])
def test_where_all_replicas_died_the_next_one_is_waited_for(nobody: list[Answer]) -> None:
    handle, learners = Handle(nobody, nobody, [report("new")]), Learners()

    publication = ObjectStorePublisher(source=learners, handle=handle).gather(1)()

    assert publication.replica_ids == {"new"}
    # Or the new one could not have its weights.
    assert learners.attended == 2
    assert [method for method, *_ in handle.asked] == ["load_weights"] * 3


def lost() -> OwnerDiedError:
    return OwnerDiedError("0" * 56, owner_address=None, call_site="")


def test_weights_that_died_with_a_learner_are_gathered_again() -> None:
    learners = Learners(version=1)
    handle = Handle([lost(), report("b", version=1)], [report("a", version=2), report("b", version=2)])
    deliver = ObjectStorePublisher(source=learners, handle=handle).gather(1)
    learners.manifest = replace(learners.manifest, version=2)

    assert deliver().version == 2
    assert [arguments[1].version for arguments in handle.asked] == [1, 2]


def test_weights_that_are_lost_for_ever_are_an_error() -> None:
    handle = Handle(*[[lost()]] * 4)
    with pytest.raises(WeightSyncError, match="could not load policy version 1"):
        ObjectStorePublisher(source=Learners(), handle=handle).gather(1)()


def test_learners_that_hold_another_version_are_found_before_a_replica_loads_it() -> None:
    handle = Handle()

    with pytest.raises(WeightSyncError, match="published version 1 where 2 was due"):
        ObjectStorePublisher(source=Learners(version=1), handle=handle).gather(2)
    assert handle.asked == []


def test_replicas_that_do_not_answer_in_time_are_a_weight_sync_error() -> None:
    with pytest.raises(WeightSyncError, match="did not answer load_weights within 600 s"):
        ObjectStorePublisher(source=Learners(), handle=Handle(TimeoutError())).gather(1)()


# Over NCCL.


def test_nccl_publication_goes_to_the_replicas_that_are_there() -> None:
    learners = Learners()
    before = [report("b", version=0), RayActorError(), report("a", version=0)]
    handle = Handle(before, [report("a", pause_s=0.2), report("b", pause_s=0.1)])

    publication = DirectPublisher(source=learners, handle=handle).gather(1)()

    assert learners.sent_to == [("a", "b")]
    assert handle.asked == [("status",), ("status",)]
    assert publication.size_bytes == 999
    assert publication.pause_s == 0.2
    assert len(publication.replica_ids) == 2


def test_a_replica_that_comes_while_weights_are_sent_pulls_them_itself() -> None:
    handle = Handle([report("a", version=0)], [report("a"), report("new", version=0)])

    assert DirectPublisher(source=Learners(), handle=handle).gather(1)().replica_ids == {"a"}


@pytest.mark.usefixtures("no_pauses")
def test_after_a_death_on_the_way_weights_are_sent_to_those_that_are_there_then() -> None:
    learners = Learners(deaths=1)
    handle = Handle(
        [report("a", version=0), report("b", version=0)],
        # One died; one had half of the weights, and ends; Serve starts others.
        [RayActorError(), RayActorError()],
        [report("c")],
        [report("c"), report("d", version=0)],
        [report("c"), report("d")],
    )

    publication = DirectPublisher(source=learners, handle=handle).gather(1)()

    assert learners.sent_to == [("a", "b"), ("c", "d")]
    assert [method for method, *_ in handle.asked] == ["status", "abandon_update", "abandon_update", "status", "status"]
    assert learners.attended == 1
    assert publication.replica_ids == {"c", "d"}


def test_deaths_without_end_are_an_error() -> None:
    handle = Handle(*[[report("a", version=0)]] * 6)
    with pytest.raises(WeightSyncError, match="died 3 times while version 1 was sent"):
        DirectPublisher(source=Learners(deaths=9), handle=handle).gather(1)()


def test_nccl_publication_is_checked_like_any_other() -> None:
    handle = Handle([report("a", version=0)], [report("a", version=0)])

    with pytest.raises(WeightSyncError, match="serves version 0 after version 1"):
        DirectPublisher(source=Learners(), handle=handle).gather(1)()


# What replicas say of their failures.


def told(replica: str, message: str, *, is_new: bool = False) -> ReplicaFailure:
    return ReplicaFailure(told_by=f"replica {replica}", message=message, is_new=is_new)


def test_the_same_error_of_a_replica_in_two_tries_ends_a_publication_over_nccl() -> None:
    learners = Learners(deaths=9)
    # Two replicas in the first try: one error, not one that has come again.
    learners.told = [
        [told("a", "RuntimeError: size mismatch at 0x7f01 for w"), told("b", "RuntimeError: size mismatch at 0x7f02")],
        [told("c", "RuntimeError: size mismatch at 0x7f03 for w")],
    ]
    handle = Handle(*[[report("a", version=0)]] * 6)
    with pytest.raises(WeightSyncError, match="replica c failed like another one before it: RuntimeError: size mism"):
        DirectPublisher(source=learners, handle=handle).gather(1)()
    assert len(learners.sent_to) == 2


def test_deaths_of_different_causes_are_told_with_the_last_of_them() -> None:
    learners = Learners(deaths=9)
    learners.told = [[told("a", "ValueError: x")], [], [told("b", "OSError: y")]]
    handle = Handle(*[[report("a", version=0)]] * 6)
    with pytest.raises(WeightSyncError, match="died 3 times while version 1 was sent; replica b: OSError: y"):
        DirectPublisher(source=learners, handle=handle).gather(1)()


def test_an_error_that_does_not_come_again_costs_a_try() -> None:
    learners = Learners(deaths=1)
    learners.told = [[told("a", "RuntimeError: out of memory")]]
    handle = Handle([report("a", version=0)], [], [report("b", version=0)], [report("b", version=0)], [report("b")])
    assert DirectPublisher(source=learners, handle=handle).gather(1)().replica_ids == {"b"}


@pytest.mark.usefixtures("no_pauses")
def test_replicas_that_cannot_start_with_the_weights_that_ended_others_are_not_waited_for() -> None:
    learners = Learners()
    learners.told = [
        [told("a", "RuntimeError: size mismatch"), told("b", "RuntimeError: size mismatch")],
        [],
        [told("c", "RuntimeError: size mismatch", is_new=True)],
    ]
    handle = Handle(*[[RayActorError(), RayActorError()]] * 5)
    with pytest.raises(WeightSyncError, match="replica c failed like another one before it: RuntimeError: size mism"):
        ObjectStorePublisher(source=learners, handle=handle).gather(1)()
    assert len(handle.asked) == 3


def test_a_replica_that_fails_while_others_load_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    learners = Learners()
    learners.told = [[told("b", "RuntimeError: out of memory")]]
    handle = Handle([report("a"), RayActorError()])
    assert ObjectStorePublisher(source=learners, handle=handle).gather(1)().replica_ids == {"a"}
    assert "replica b could not load policy weights: RuntimeError: out of memory" in caplog.text


def test_what_a_replica_raised_is_told_without_the_traceback_of_ray() -> None:
    wrapped = RayTaskError("load_weights", "Traceback ...", ValueError("size mismatch for w")).as_instanceof_cause()
    with pytest.raises(WeightSyncError, match=r"version 1: ValueError\('size mismatch for w'\)$"):
        checked_pause(1, [wrapped])
