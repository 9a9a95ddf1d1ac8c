from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from rlhf_ray.config.settings import DataSettings, RolloutSettings, Settings
from rlhf_ray.rollouts.admission import FlowRules, GroupLedger, max_concurrent_groups


def ledger(**given: Any) -> GroupLedger[int]:
    """A ledger of two groups per update, which may lag one version behind, unless it is given otherwise."""
    rules = FlowRules(
        batch_size=2,
        max_staleness=1,
        max_concurrent=99,
        max_failures=0,
        max_equal_groups=None,
        partial_rollouts=False,
        greedy_baseline=False,
        stall_timeout_s=1.0,
        seed=0,
    )
    return GroupLedger(replace(rules, **given))


def fill(groups: GroupLedger[int]) -> list[int]:
    return [groups.admit() for _ in range(groups.capacity())]


@pytest.mark.parametrize(
    ("staleness", "version", "max_concurrent", "running", "accepted", "capacity"),
    [
        # Synchronous, B = 4: one batch a version.
        (0, 0, 4, 0, 0, 4),
        (0, 0, 4, 3, 0, 1),
        (0, 0, 4, 1, 3, 0),
        (0, 0, 4, 0, 4, 0),
        (0, 1, 4, 0, 4, 4),
        (0, 7, 4, 0, 28, 4),
        # Fewer at once than a batch, and more.
        (0, 0, 2, 0, 0, 2),
        (0, 0, 2, 1, 2, 1),
        (0, 0, 99, 0, 0, 4),
        # One version of lag admits one batch more, ever.
        (1, 0, 99, 0, 0, 8),
        (1, 0, 99, 4, 4, 0),
        (1, 1, 99, 4, 4, 4),
        # More accepted than the bound allows, as after a restart with a smaller bound.
        (0, 0, 4, 0, 9, 0),
    ],
)
def test_capacity_by_hand(
    staleness: int, version: int, max_concurrent: int, running: int, accepted: int, capacity: int
) -> None:
    groups = ledger(batch_size=4, max_staleness=staleness, max_concurrent=max_concurrent)
    groups.restart(version)
    groups._accepted = accepted
    for _ in range(running):
        groups.admit()

    assert groups.capacity() == capacity


@pytest.mark.parametrize(("staleness", "given", "wanted"), [(0, None, 8), (2, None, 24), (2, 5, 5)])
def test_by_default_all_that_may_be_admitted_runs_at_once(staleness: int, given: int | None, wanted: int) -> None:
    rollouts = RolloutSettings(max_staleness=staleness, max_concurrent_groups=given)

    assert max_concurrent_groups(Settings(rollouts=rollouts, data=DataSettings(batch_size=8))) == wanted


# Which groups are in a batch.


def test_synchronous_batches_are_whole() -> None:
    groups = ledger(max_staleness=0)
    first, second = fill(groups)

    groups.accept(second, 20)
    assert groups.batch(groups.version) is None
    groups.accept(first, 10)
    assert groups.batch(groups.version) == [10, 20]
    assert groups.capacity() == 0, "the next ones belong to the next version"


def test_groups_that_are_ready_go_first_while_there_is_time() -> None:
    groups = ledger()
    *_, third, fourth = fill(groups)
    groups.accept(third, 3)
    groups.accept(fourth, 4)

    assert groups.batch(groups.version) == [3, 4]


def test_of_those_ready_the_oldest_go_first() -> None:
    groups = ledger()
    for ticket in reversed(fill(groups)):
        groups.accept(ticket, ticket)

    assert groups.batch(groups.version) == [1, 2]


def test_a_straggler_is_waited_for_in_its_last_version() -> None:
    groups = ledger()
    slow, *others = fill(groups)
    for ticket in others:
        groups.accept(ticket, ticket)
    assert groups.batch(groups.version) == [2, 3]
    groups.version = 1
    for ticket in fill(groups):
        groups.accept(ticket, ticket)

    assert groups.ready == 3
    assert groups.batch(groups.version) is None, "of version 0, which may not be two versions late"
    groups.accept(slow, slow)
    assert groups.batch(groups.version) == [1, 4]


def test_stragglers_that_would_not_fit_the_batches_left_are_waited_for_earlier() -> None:
    """Six of version 0 in three batches of two: the second batch cannot be of version 1 alone."""
    groups = ledger(max_staleness=2)
    first = fill(groups)
    for ticket in first[:2]:
        groups.accept(ticket, ticket)
    assert groups.batch(groups.version) == first[:2]
    groups.version = 1
    for ticket in fill(groups):
        groups.accept(ticket, ticket)

    assert groups.batch(groups.version) is None
    groups.accept(first[2], first[2])
    assert groups.batch(groups.version) is None
    groups.accept(first[3], first[3])
    assert groups.batch(groups.version) == first[2:4]


def test_a_straggler_is_carried_over_its_last_version_where_that_is_allowed() -> None:
    groups = ledger(partial_rollouts=True)
    slow, *others = fill(groups)
    for ticket in others:
        groups.accept(ticket, ticket)
    assert groups.batch(0) == [2, 3]
    assert groups.carried == 0, "one version is left"
    groups.version = 1
    fifth, sixth = fill(groups)
    groups.accept(fifth, fifth)

    assert groups.batch(1) == [4, 5]
    assert groups.carried == 1
    groups.version = 2
    newer = fill(groups)
    assert len(newer) == 2, "it takes the room of a group of its new version"
    groups.accept(slow, slow)
    groups.accept(sixth, sixth)
    assert groups.batch(2) == [slow, sixth], "now of version 1, and sent before the other one"


def straggler_of(groups: GroupLedger[int]) -> int:
    """The one group of version 0 that is in flight in its last version, with enough others ready for a batch."""
    slow, *others = fill(groups)
    for ticket in others:
        groups.accept(ticket, ticket)
    groups.batch(0)
    groups.version = 1
    for ticket in fill(groups):
        groups.accept(ticket, ticket)
    return slow


def test_one_that_only_waits_for_its_reward_is_waited_for() -> None:
    """It gets no newer tokens: all that it has would be too old."""
    groups = ledger(partial_rollouts=True)
    slow = straggler_of(groups)
    groups.written(slow)
    assert groups.batch(1) is None

    groups.accept(slow, slow)
    assert groups.batch(1) == [slow, 4]
    assert groups.carried == 0


def test_a_group_that_is_carried_and_then_rejected_gives_its_room_back() -> None:
    groups = ledger(partial_rollouts=True)
    slow = straggler_of(groups)
    groups.batch(1)
    assert (groups.carried, groups.capacity()) == (1, 0)

    groups.reject(slow)
    assert (groups.running, groups.capacity()) == (0, 1)


def test_no_more_are_carried_than_have_to_be() -> None:
    """Three of version 0 are late in version 1; in their last one, one of them can still be in the next batch."""
    groups = ledger(batch_size=3, partial_rollouts=True)
    first = fill(groups)
    for ticket in first[3:]:
        groups.accept(ticket, ticket)
    assert groups.batch(0) == first[3:]
    groups.version = 1
    second = fill(groups)
    for ticket in (first[0], *second):
        groups.accept(ticket, ticket)

    assert groups.batch(1) == [first[0], *second[:2]]
    assert groups.carried == 2


def test_a_rejected_group_gives_its_room_back() -> None:
    groups = ledger(max_staleness=0)
    first, second = fill(groups)

    groups.reject(first)
    assert (groups.capacity(), groups.running) == (1, 1)
    groups.accept(second, 2)
    assert groups.capacity() == 1


def test_a_restart_forgets_groups_and_counts_earlier_versions() -> None:
    groups = ledger(max_staleness=0)
    groups.accept(fill(groups)[0], 1)

    groups.restart(7)

    assert (groups.version, groups.running, groups.ready, groups.capacity()) == (7, 0, 0, 2)


class Schedule:
    """One random run: groups end in any order, some are rejected, and the learner comes when it comes."""

    def __init__(self, seed: int, staleness: int, max_concurrent: int | None = None, *, carries: bool = False) -> None:
        self.rng = random.Random(seed)
        self.batch_size = self.rng.randint(1, 6)
        self.reject = self.rng.choice([0.0, 0.2, 0.7])
        # A few groups that hardly ever end, as long completions and slow replicas are.
        self.slow = self.rng.choice([0.0, 0.1, 0.5])
        self.groups = ledger(
            batch_size=self.batch_size,
            max_staleness=staleness,
            max_concurrent=max_concurrent or self.rng.choice([1, 3, 10, 1000]),
            partial_rollouts=carries,
        )
        self.staleness = staleness
        self.version = 0
        self.late = self.rng.choice([0.0, 0.5, 1.0])
        self.admitted_at: dict[int, int] = {}
        self.running: set[int] = set()
        self.stragglers: set[int] = set()
        self.trained: Counter[int] = Counter()
        self.rejected: set[int] = set()
        self.worst = 0

    def admit(self) -> None:
        for ticket in fill(self.groups):
            self.admitted_at[ticket] = self.groups.version
            self.running.add(ticket)
            if self.rng.random() < self.slow:
                self.stragglers.add(ticket)

    def end_some(self) -> None:
        quick = sorted(self.running - self.stragglers)
        ending = self.rng.sample(quick, self.rng.randint(0, len(quick))) if quick else []
        # Nothing else moves: even the slowest ends some day.
        ending = ending or [self.rng.choice(sorted(self.running))]
        for ticket in ending:
            self.running.remove(ticket)
            if self.rng.random() < self.reject:
                self.groups.reject(ticket)
                self.rejected.add(ticket)
            else:
                self.groups.accept(ticket, ticket)

    def next_batch(self) -> list[int] | None:
        batch = self.groups.batch(self.version)
        assert batch is None or batch == sorted(batch, key=lambda ticket: (self.admitted_at[ticket], ticket))
        return batch

    def age(self, ticket: int) -> int:
        return self.version - self.admitted_at[ticket]

    def train(self) -> None:
        while (batch := self.next_batch()) is not None:
            assert len(batch) == self.batch_size
            self.worst = max(self.worst, *map(self.age, batch))
            self.trained.update(batch)
            self.version += 1
            # The newest policy may still be on its way to the replicas, the one before is there.
            self.groups.version = self.version - (self.staleness > 0 and self.rng.random() < self.late)
            if self.rng.random() < 0.5:  # The learner is behind, or at once back.
                self.admit()

    def finish(self) -> None:
        while self.version < 40:
            self.admit()
            is_moving = self.running or self.groups.ready >= self.batch_size
            assert is_moving, "something is in flight, or nothing would ever happen"
            if self.running:
                self.end_some()
            self.train()


def assert_that_none_is_lost_too_old_or_trained_twice(run: Schedule) -> None:
    assert run.worst <= run.staleness
    assert max(run.trained.values()) == 1
    assert not run.rejected & run.trained.keys()
    waiting = len(run.running) + run.groups.ready
    assert len(run.admitted_at) == len(run.trained) + len(run.rejected) + waiting
    assert waiting <= (run.staleness + 1) * run.batch_size


@pytest.mark.parametrize("staleness", [0, 1, 2, 5])
@pytest.mark.parametrize("seed", range(40))
def test_staleness_keeps_its_bound_and_no_group_is_lost_or_trained_twice(staleness: int, seed: int) -> None:
    run = Schedule(seed, staleness)
    run.finish()

    assert_that_none_is_lost_too_old_or_trained_twice(run)
    left = run.admitted_at.keys() - run.trained.keys() - run.rejected
    assert all(run.age(ticket) <= staleness for ticket in left)


class CarryingSchedule(Schedule):
    """With partial rollouts: a group is as old as its last token."""

    def __init__(self, seed: int, staleness: int) -> None:
        super().__init__(seed, staleness, carries=True)
        self.ended_at: dict[int, int] = {}

    def end_some(self) -> None:
        before = set(self.running)
        super().end_some()
        self.ended_at |= dict.fromkeys(before - self.running, self.groups.version)

    def next_batch(self) -> list[int] | None:
        if self.groups.ready < self.batch_size:
            return None
        batch = self.groups.batch(self.version)
        assert batch is not None, "enough are ready, so nothing is waited for"
        return batch

    def age(self, ticket: int) -> int:
        return self.version - self.ended_at[ticket]


@pytest.mark.parametrize("staleness", [1, 2, 5])
@pytest.mark.parametrize("seed", range(40))
def test_with_partial_rollouts_no_batch_waits_and_none_is_without_a_fresh_token(staleness: int, seed: int) -> None:
    run = CarryingSchedule(seed, staleness)
    run.finish()

    assert_that_none_is_lost_too_old_or_trained_twice(run)


def test_those_schedules_have_stragglers_to_carry() -> None:
    runs = [CarryingSchedule(seed, 2) for seed in range(40)]
    for run in runs:
        run.finish()

    assert sum(run.groups.carried > 0 for run in runs) >= 5


@pytest.mark.parametrize("seed", range(10))
def test_the_bound_is_used(seed: int) -> None:
    """A bound that nothing reaches would be a synchronous run in disguise."""
    run = Schedule(seed, 2, max_concurrent=1000)
    while run.version < 40:
        run.admit()
        run.end_some()
        run.train()

    assert run.worst >= 1
