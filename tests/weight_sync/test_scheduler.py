from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from unittest.mock import Mock

import pytest

from rlhf_ray.errors import WeightSyncError
from rlhf_ray.weight_sync import scheduler as module
from rlhf_ray.weight_sync.publisher import SyncResult
from rlhf_ray.weight_sync.scheduler import WeightSyncScheduler

PATIENCE_S = 10.0


class Publisher:
    """Replicas that have a version when they are told so, and learners that remember when they were asked."""

    def __init__(self) -> None:
        self.gathered: list[int] = []
        self.replicas = frozenset({"a", "b"})
        self.failing: set[int] = set()
        self.doors: dict[int, threading.Event] = {}

    def hold(self, version: int) -> threading.Event:
        self.doors[version] = threading.Event()
        return self.doors[version]

    def gather(self, version: int) -> Callable[[], SyncResult]:
        self.gathered.append(version)

        def deliver() -> SyncResult:
            assert asyncio._get_running_loop() is None
            if version in self.doors:
                assert self.doors[version].wait(PATIENCE_S)
            if version in self.failing:
                raise WeightSyncError(f"version {version} is lost")
            return SyncResult(version=version, size_bytes=1, pause_s=0.0, replica_ids=self.replicas, publication_s=0.0)

        return deliver


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    publisher = Publisher()
    yield publisher
    for door in publisher.doors.values():
        door.set()


def make(publisher: Publisher, *, overlapping: bool = True) -> tuple[WeightSyncScheduler, list[int]]:
    published: list[int] = []
    return WeightSyncScheduler(publisher, published=published.append, overlaps_training=overlapping), published


@pytest.mark.parametrize("overlapping", [True, False])
def test_replicas_are_called_where_no_event_loop_runs(publisher: Publisher, overlapping: bool) -> None:
    scheduler, published = make(publisher, overlapping=overlapping)

    async def notebook() -> None:
        for version in (1, 2):
            scheduler.publish(version)
        scheduler.wait_pending()

    asyncio.run(notebook())
    assert published == [1, 2]


def test_an_interrupted_wait_is_waited_for_once_more(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, published = make(publisher, overlapping=False)
    door = publisher.hold(1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "wait", Mock(side_effect=KeyboardInterrupt))
        scheduler.publish(1)
    assert scheduler.version is None
    door.set()
    scheduler.wait_pending(PATIENCE_S)
    assert published == [1]


def test_where_nothing_may_be_stale_each_is_waited_for(publisher: Publisher) -> None:
    scheduler, published = make(publisher, overlapping=False)
    for version in (1, 2):
        assert scheduler.publish(version).version == version
        assert published[-1] == scheduler.version == version


def test_the_first_is_waited_for_and_later_ones_go_on_overlaps_training(publisher: Publisher) -> None:
    scheduler, published = make(publisher)
    assert scheduler.publish(1).version == 1
    door = publisher.hold(2)

    assert scheduler.publish(2).version == 1
    assert (scheduler.version, published) == (2, [1])

    door.set()
    assert scheduler.publish(3).version == 2
    assert published[:2] == [1, 2]


def test_the_learners_are_not_asked_before_the_one_before_is_there(publisher: Publisher) -> None:
    scheduler, published = make(publisher)
    scheduler.publish(1)
    door = publisher.hold(2)
    scheduler.publish(2)

    later = threading.Thread(target=scheduler.publish, args=(3,))
    later.start()
    later.join(0.1)
    assert publisher.gathered == [1, 2]
    door.set()
    later.join(PATIENCE_S)
    assert publisher.gathered == [1, 2, 3]
    scheduler.wait_pending()
    assert published == [1, 2, 3]


def test_one_that_has_to_be_there_is_waited_for(publisher: Publisher) -> None:
    scheduler, published = make(publisher)
    scheduler.publish(1)
    scheduler.publish(2)
    assert scheduler.publish(3, overlapping=False).version == 3
    assert published == [1, 2, 3]


def test_a_failure_overlaps_training_comes_with_the_next_one_and_is_made_good(publisher: Publisher) -> None:
    publisher.failing = {2}
    scheduler, published = make(publisher)
    scheduler.publish(1)
    scheduler.publish(2)

    with pytest.raises(WeightSyncError, match="version 2 is lost"):
        scheduler.publish(3)
    assert scheduler.version is None
    assert scheduler.publish(3, overlapping=False).version == scheduler.version == 3
    assert published == [1, 3]


def test_what_failed_and_is_of_no_use_is_forgotten(publisher: Publisher) -> None:
    publisher.failing = {2}
    scheduler, published = make(publisher)
    scheduler.publish(1)
    scheduler.publish(2)
    scheduler.wait_pending()
    scheduler.publish(1, overlapping=False)
    assert published == [1, 1]


def test_the_learners_half_needs_no_replica(publisher: Publisher) -> None:
    """Where they share GPUs, replicas sleep until the learners' turn is over."""
    scheduler, published = make(publisher, overlapping=False)
    publisher.hold(1)
    scheduler.gather(1)
    assert (publisher.gathered, published, scheduler.version) == ([1], [], None)
    publisher.doors[1].set()
    assert scheduler.deliver().version == 1
    assert (published, scheduler.version) == ([1], 1)


def test_an_interrupted_delivery_is_waited_for_before_the_learners_come(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, published = make(publisher, overlapping=False)
    publisher.hold(1)

    def interrupt(pending: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "wait", interrupt)
        scheduler.publish(1)
    threading.Timer(0.05, publisher.doors[1].set).start()
    scheduler.finish_interrupted()
    assert published == [1]


def test_settling_has_an_end(publisher: Publisher) -> None:
    scheduler, published = make(publisher)
    scheduler.publish(1)
    publisher.hold(2)
    scheduler.publish(2)
    scheduler.wait_pending(0.05)
    assert published == [1]


def test_replicas_that_came_after_the_first_publication_are_counted(publisher: Publisher) -> None:
    scheduler, _ = make(publisher, overlapping=False)
    scheduler.publish(1)
    assert scheduler.new_replicas == 0
    publisher.replicas = frozenset({"a", "c"})
    scheduler.publish(2)
    scheduler.publish(3)
    assert scheduler.new_replicas == 1
    publisher.replicas = frozenset({"d", "e"})
    scheduler.publish(4)
    assert scheduler.new_replicas == 3
