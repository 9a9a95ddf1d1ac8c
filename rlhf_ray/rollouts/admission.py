"""Which groups may be started, and which are trained on next, so that none is staler than it may be.

Plain bookkeeping without clocks, threads or Ray: the rollout flow (flow.py) asks it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

from rlhf_ray.config.settings import Settings

__all__ = ["FlowRules", "GroupLedger", "max_concurrent_groups"]

Item = TypeVar("Item")


def max_concurrent_groups(settings: Settings) -> int:
    """Groups in flight at once: the setting, or all that the staleness rule may ever admit."""
    everything = (settings.rollouts.max_staleness + 1) * settings.data.batch_size
    return settings.rollouts.max_concurrent_groups or everything


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowRules:
    """How many groups are rolled out at once and ahead, and how many may fail."""

    batch_size: int
    """Groups per update."""
    max_staleness: int
    """Versions that a group may lag behind."""
    max_concurrent: int
    """Groups in flight at once."""
    max_failures: int
    """Failed rewards in one batch before :class:`RewardError`."""
    max_equal_groups: int | None
    """Dynamic sampling: groups of equal rewards dropped in one batch before :class:`RewardError`; ``None``: such groups
    are kept."""
    partial_rollouts: bool
    """Whether a group in its last version is carried over instead of waited for."""
    greedy_baseline: bool
    """Whether every group also gets a greedy trajectory and its reward."""
    stall_timeout_s: float
    """Longest wait without progress of any group."""
    seed: int
    """The run's seed."""

    @classmethod
    def of(cls, settings: Settings, *, greedy_baseline: bool) -> Self:
        """The rules of a run."""
        rollouts, batch_size, max_failures = settings.rollouts, settings.data.batch_size, settings.rewards.max_failures
        max_equal = rollouts.max_dropped_groups
        if max_equal is None:
            max_equal = 10 * batch_size
        return cls(
            batch_size=batch_size,
            max_staleness=rollouts.max_staleness,
            max_concurrent=max_concurrent_groups(settings),
            max_failures=batch_size if max_failures is None else max_failures,
            max_equal_groups=max_equal if rollouts.dynamic_sampling else None,
            partial_rollouts=rollouts.partial_rollouts,
            greedy_baseline=greedy_baseline,
            stall_timeout_s=rollouts.stall_timeout_s,
            seed=settings.debugging.seed,
        )


class GroupLedger(Generic[Item]):
    """Groups in flight and groups ready, by the policy version at which they were admitted.

    Every batch has exactly ``batch_size`` groups, and a group that was admitted at version ``a`` is in a batch of
    version ``a + max_staleness`` at the latest. Two rules make that so:

    - Admission: :meth:`capacity`. At version ``v`` at most ``(max_staleness + 1) * batch_size`` groups are
      in flight or ready.
    - Batches: oldest first, and none is made before it can be made without leaving too many old ones behind. Those
      admitted up to ``a`` that a batch of version ``v`` leaves behind must fit the batches up to version
      ``a + max_staleness``: ``alive(a) - taken(a) <= (a + max_staleness - v) * batch_size``. A straggler is so waited
      for in its last version, and not before.

    With partial rollouts a straggler is not waited for: in its last version it counts as admitted at the newest one,
    and a batch is made as soon as enough groups are ready. Its tokens that are too old are left out when it is trained
    on (``SequenceBatch.from_groups``). One that is written, and only waits for its reward, is waited for: it would get
    no newer token.

    Args:
        rules: Of the run.
    """

    def __init__(self, rules: FlowRules) -> None:
        self._rules = rules
        self._alive: Counter[int] = Counter()
        self._ready: defaultdict[int, list[tuple[int, Item]]] = defaultdict(list)
        self._in_flight: dict[int, int] = {}
        self._written: set[int] = set()
        self._admitted = 0
        self._accepted = 0
        self.version = 0
        """The newest that replicas have, and groups are admitted for; it may only rise between two :meth:`restart`."""
        self.carried = 0
        """How often a group was carried over."""

    def restart(self, version: int) -> None:
        """Forget all groups; those of earlier versions count as accepted."""
        self._alive.clear()
        self._ready.clear()
        self._in_flight.clear()
        self._written.clear()
        self._accepted = version * self._rules.batch_size
        self.version = version

    @property
    def running(self) -> int:
        """Groups in flight."""
        return len(self._in_flight)

    @property
    def ready(self) -> int:
        """Groups accepted and not yet in a batch."""
        return sum(map(len, self._ready.values()))

    def waiting(self) -> Iterator[Item]:
        """What was accepted and is not yet in a batch."""
        return (item for entries in self._ready.values() for _, item in entries)

    def capacity(self) -> int:
        """Groups that may be admitted now (AReaL, arXiv:2505.24298, section 5.1).

        ``min(max_concurrent - running, (max_staleness + version + 1) * batch_size - (accepted + running))``, with
        ``accepted`` groups finished since the start and ``running`` in flight. ``max_staleness = 0`` is synchronous
        PPO.
        """
        rules = self._rules
        left = (rules.max_staleness + self.version + 1) * rules.batch_size - (self._accepted + self.running)
        return max(0, min(rules.max_concurrent - self.running, left))

    def admit(self) -> int:
        """Put a group in flight; returns its ticket."""
        self._admitted += 1
        self._in_flight[self._admitted] = self.version
        self._alive[self.version] += 1
        return self._admitted

    def written(self, ticket: int) -> None:
        """All tokens of a group in flight are there."""
        self._written.add(ticket)

    def reject(self, ticket: int) -> None:
        """End a group in flight that is not trained on; its capacity is free again."""
        self._alive[self._end(ticket)] -= 1

    def accept(self, ticket: int, item: Item) -> None:
        """End a group in flight that is to be trained on."""
        self._ready[self._end(ticket)].append((ticket, item))
        self._accepted += 1

    def _end(self, ticket: int) -> int:
        self._written.discard(ticket)
        return self._in_flight.pop(ticket)

    def batch(self, version: int) -> list[Item] | None:
        """Take the batch that policy ``version`` is trained on next, in the order of admission.

        Replicas may have that version already or be behind it. ``None`` where the batch must wait for groups in flight.
        """
        if self.ready < self._rules.batch_size:
            return None
        if too_many := self._left_too_late(version):
            if not self._rules.partial_rollouts:
                return None
            # There are as many of the versions in question: the groups that are ready fit their batches.
            oldest = sorted(self._in_flight, key=lambda ticket: (self._in_flight[ticket], ticket))[:too_many]
            if not self._written.isdisjoint(oldest):
                return None
            self._carry(oldest)
        return self._take_oldest()

    def _left_too_late(self, version: int) -> int:
        """How many groups the batches from ``version`` on cannot take in time, if one is made now."""
        alive = ready = too_many = 0
        for admitted in range(version - self._rules.max_staleness, version + 1):
            alive += self._alive[admitted]
            ready += len(self._ready.get(admitted, ()))
            left_for_later = (admitted + self._rules.max_staleness - version) * self._rules.batch_size
            too_many = max(too_many, alive - min(ready, self._rules.batch_size) - left_for_later)
        return too_many

    def _carry(self, tickets: list[int]) -> None:
        """Let groups in flight count as admitted now."""
        for ticket in tickets:
            self._alive[self._in_flight[ticket]] -= 1
            self._in_flight[ticket] = self.version
            self._alive[self.version] += 1
        self.carried += len(tickets)

    def _take_oldest(self) -> list[Item]:
        batch: list[Item] = []
        for admitted in sorted(self._ready):
            entries = sorted(self._ready.pop(admitted), key=lambda entry: entry[0])
            taken, left = entries[: self._rules.batch_size - len(batch)], entries[self._rules.batch_size - len(batch) :]
            batch += [item for _, item in taken]
            self._alive[admitted] -= len(taken)
            if left:
                self._ready[admitted] = left
        return batch
