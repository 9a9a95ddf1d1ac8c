from __future__ import annotations

import pytest

from rlhf_ray.tune.queue import Room, TrialRoom


class Cluster:
    """Eight CPUs and two GPUs, and a clock."""

    def __init__(self) -> None:
        self.free = Room(cpus=8.0, gpus=2.0)
        self.now = 0.0

    def room(self) -> TrialRoom:
        return TrialRoom(lambda: self.free, lambda: self.now)


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


def test_a_trial_gets_its_room_and_the_next_one_what_is_left(cluster: Cluster) -> None:
    room = cluster.room()
    first = room.ask("a", Room(cpus=3.0, gpus=1.0))
    assert (first.granted, first.others, first.is_next) == (True, 0, True)
    # The cluster shows nothing of it yet: the first trial is still starting.
    second = room.ask("b", Room(cpus=5.0, gpus=1.0))
    assert (second.granted, second.free, second.others) == (True, Room(cpus=5.0, gpus=1.0), 1)
    third = room.ask("c", Room(cpus=0.1, gpus=0.0))
    assert (third.granted, third.free, third.others) == (False, Room(cpus=0.0, gpus=0.0), 2)


def test_gpus_count_too(cluster: Cluster) -> None:
    room = cluster.room()
    assert room.ask("a", Room(cpus=1.0, gpus=2.0)).granted
    assert not room.ask("b", Room(cpus=1.0, gpus=1.0)).granted


def test_nothing_else_starts_while_pairs_are_placed(cluster: Cluster) -> None:
    room, pair, other = cluster.room(), Room(cpus=1.0, gpus=1.0, in_pairs=True), Room(cpus=1.0, gpus=1.0)
    assert room.ask("a", pair).granted
    assert not room.ask("b", pair).granted
    room.started("a")
    cluster.free = Room(cpus=7.0, gpus=1.0)
    assert room.ask("b", pair).granted
    room.leave("b")
    assert room.ask("c", other).granted
    assert not room.ask("d", Room(cpus=1.0, gpus=0.0, in_pairs=True)).granted
    room.leave("c")
    assert room.ask("d", Room(cpus=1.0, gpus=0.0, in_pairs=True)).granted
    assert not room.ask("c", other).granted


def test_what_a_started_trial_takes_is_counted_once(cluster: Cluster) -> None:
    room = cluster.room()
    room.ask("a", Room(cpus=6.0, gpus=0.0))
    cluster.free = Room(cpus=2.0, gpus=2.0)  # Its actors are there.
    assert not room.ask("b", Room(cpus=2.0, gpus=0.0)).granted
    room.started("a")
    assert room.ask("b", Room(cpus=2.0, gpus=0.0)).granted


def test_a_small_trial_does_not_overtake_a_large_one(cluster: Cluster) -> None:
    room = cluster.room()
    room.ask("a", Room(cpus=6.0, gpus=0.0))
    assert not room.ask("large", Room(cpus=4.0, gpus=0.0)).granted
    overtaking = room.ask("small", Room(cpus=1.0, gpus=0.0))
    assert (overtaking.granted, overtaking.is_next) == (False, False)
    room.leave("a")
    assert room.ask("large", Room(cpus=4.0, gpus=0.0)).granted
    assert room.ask("small", Room(cpus=1.0, gpus=0.0)).granted


def test_one_that_has_stopped_asking_is_forgotten(cluster: Cluster) -> None:
    room = cluster.room()
    room.ask("a", Room(cpus=8.0, gpus=0.0))
    room.ask("dead", Room(cpus=8.0, gpus=0.0))
    cluster.now = 29.0
    assert not room.ask("b", Room(cpus=1.0, gpus=0.0)).is_next
    cluster.now = 31.0
    assert room.ask("b", Room(cpus=1.0, gpus=0.0)).is_next


def test_the_room_is_empty_after_the_last_trial(cluster: Cluster) -> None:
    room = cluster.room()
    assert room.is_empty()
    room.ask("a", Room(cpus=8.0, gpus=0.0))
    room.ask("b", Room(cpus=8.0, gpus=0.0))
    room.started("a")
    room.leave("a")
    assert not room.is_empty()
    cluster.now = 31.0
    assert room.is_empty()
    room.leave("never came")
    room.started("never came")
    assert room.is_empty()


def test_thousandths_that_ray_rounds_away_do_not_keep_a_trial_out(cluster: Cluster) -> None:
    cluster.free = Room(cpus=1.80000000004 - 1e-5, gpus=0.0)
    assert cluster.room().ask("a", Room(cpus=1.8, gpus=0.0)).granted


@pytest.mark.parametrize(
    ("room", "text"), [(Room(cpus=1.7, gpus=0.0), "1.7 CPUs"), (Room(cpus=12.0, gpus=2.0), "12 CPUs and 2 GPUs")]
)
def test_room_is_written_for_people(room: Room, text: str) -> None:
    assert str(room) == text
