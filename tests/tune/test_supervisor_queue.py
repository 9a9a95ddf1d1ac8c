from __future__ import annotations

import pytest

from rlhf_ray.tune.supervisor import Resources, TrialQueue


class Cluster:
    """Eight CPUs and two GPUs, and a clock."""

    def __init__(self) -> None:
        self.free = Resources(cpus=8.0, gpus=2.0)
        self.now = 0.0

    def queue(self) -> TrialQueue:
        return TrialQueue(lambda: self.free, lambda: self.now)


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


def test_a_trial_gets_what_it_needs_and_the_next_one_what_is_left(cluster: Cluster) -> None:
    queue = cluster.queue()
    first = queue.ask("a", Resources(cpus=3.0, gpus=1.0))
    assert (first.granted, first.others, first.is_next) == (True, 0, True)
    # The cluster shows nothing of it yet: the first trial is still starting.
    second = queue.ask("b", Resources(cpus=5.0, gpus=1.0))
    assert (second.granted, second.free, second.others) == (True, Resources(cpus=5.0, gpus=1.0), 1)
    third = queue.ask("c", Resources(cpus=0.1, gpus=0.0))
    assert (third.granted, third.free, third.others) == (False, Resources(cpus=0.0, gpus=0.0), 2)


def test_gpus_count_too(cluster: Cluster) -> None:
    queue = cluster.queue()
    assert queue.ask("a", Resources(cpus=1.0, gpus=2.0)).granted
    assert not queue.ask("b", Resources(cpus=1.0, gpus=1.0)).granted


def test_nothing_else_starts_while_pairs_are_placed(cluster: Cluster) -> None:
    queue, pair, other = cluster.queue(), Resources(cpus=1.0, gpus=1.0, in_pairs=True), Resources(cpus=1.0, gpus=1.0)
    assert queue.ask("a", pair).granted
    assert not queue.ask("b", pair).granted
    queue.started("a")
    cluster.free = Resources(cpus=7.0, gpus=1.0)
    assert queue.ask("b", pair).granted
    queue.leave("b")
    assert queue.ask("c", other).granted
    assert not queue.ask("d", Resources(cpus=1.0, gpus=0.0, in_pairs=True)).granted
    queue.leave("c")
    assert queue.ask("d", Resources(cpus=1.0, gpus=0.0, in_pairs=True)).granted
    assert not queue.ask("c", other).granted


def test_what_a_started_trial_takes_is_counted_once(cluster: Cluster) -> None:
    queue = cluster.queue()
    queue.ask("a", Resources(cpus=6.0, gpus=0.0))
    cluster.free = Resources(cpus=2.0, gpus=2.0)  # Its actors are there.
    assert not queue.ask("b", Resources(cpus=2.0, gpus=0.0)).granted
    queue.started("a")
    assert queue.ask("b", Resources(cpus=2.0, gpus=0.0)).granted


def test_a_small_trial_does_not_overtake_a_large_one(cluster: Cluster) -> None:
    queue = cluster.queue()
    queue.ask("a", Resources(cpus=6.0, gpus=0.0))
    assert not queue.ask("large", Resources(cpus=4.0, gpus=0.0)).granted
    overtaking = queue.ask("small", Resources(cpus=1.0, gpus=0.0))
    assert (overtaking.granted, overtaking.is_next) == (False, False)
    queue.leave("a")
    assert queue.ask("large", Resources(cpus=4.0, gpus=0.0)).granted
    assert queue.ask("small", Resources(cpus=1.0, gpus=0.0)).granted


def test_one_that_has_stopped_asking_is_forgotten(cluster: Cluster) -> None:
    queue = cluster.queue()
    queue.ask("a", Resources(cpus=8.0, gpus=0.0))
    queue.ask("dead", Resources(cpus=8.0, gpus=0.0))
    cluster.now = 29.0
    assert not queue.ask("b", Resources(cpus=1.0, gpus=0.0)).is_next
    cluster.now = 31.0
    assert queue.ask("b", Resources(cpus=1.0, gpus=0.0)).is_next


def test_the_queue_is_empty_after_the_last_trial(cluster: Cluster) -> None:
    queue = cluster.queue()
    assert queue.is_empty()
    queue.ask("a", Resources(cpus=8.0, gpus=0.0))
    queue.ask("b", Resources(cpus=8.0, gpus=0.0))
    queue.started("a")
    queue.leave("a")
    assert not queue.is_empty()
    cluster.now = 31.0
    assert queue.is_empty()
    queue.leave("never came")
    queue.started("never came")
    assert queue.is_empty()


def test_thousandths_that_ray_rounds_away_do_not_keep_a_trial_out(cluster: Cluster) -> None:
    cluster.free = Resources(cpus=1.80000000004 - 1e-5, gpus=0.0)
    assert cluster.queue().ask("a", Resources(cpus=1.8, gpus=0.0)).granted


@pytest.mark.parametrize(
    ("resources", "text"),
    [(Resources(cpus=1.7, gpus=0.0), "1.7 CPUs"), (Resources(cpus=12.0, gpus=2.0), "12 CPUs and 2 GPUs")],
)
def test_resources_are_written_with_units(resources: Resources, text: str) -> None:
    assert str(resources) == text


def test_one_that_starts_nothing_is_named_until_it_does(cluster: Cluster) -> None:
    queue = cluster.queue()
    queue.ask("a", Resources(cpus=1.0, gpus=0.0))
    queue.ask("waits", Resources(cpus=8.0, gpus=0.0))
    cluster.now = 10.0
    assert (queue.unwatched(10.0), queue.unwatched(9.0)) == ([], ["a"])
    queue.watch("a", "parts")
    assert (queue.unwatched(9.0), queue.watched()) == ([], {"a": "parts"})
    queue.watch("late", "its parts")
    assert queue.watched().keys() == {"a", "late"}
