"""What happens between two batches: how long replicas had work, and how many groups were dropped, within limits."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rlhf_ray.errors import RewardError
from rlhf_ray.rollouts.admission import FlowRules
from rlhf_ray.types import EnvironmentStats, RewardFailure, RolloutGroup, ScoredGroup, TraceSpan

__all__ = ["Collected", "Tally", "log_failures", "now"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """One batch of scored groups and how it came about."""

    groups: tuple[ScoredGroup, ...]
    """Sorted by ``group_id``."""
    failures: Counter[str]
    """Groups dropped since the last batch because a reward function failed, by kind."""
    equal_reward_groups: int
    """Groups dropped because their rewards were all equal (dynamic sampling)."""
    carried_groups: int
    """Groups in flight that the batch did not wait for in their last version (partial rollouts)."""
    rollout_s: float
    """How long the batch was waited for, to the last rollout."""
    reward_s: float
    """How long it was waited for after that: what rewards add to the rollout."""
    generated_tokens: int
    """Tokens sampled by rollouts that finished since the last batch, whichever batch they are for."""
    generating_s: float
    """Time since the last batch with a group at the replicas."""
    elapsed_s: float
    """All of the time since the last batch."""
    spans: tuple[TraceSpan, ...]
    """What replicas generated since the last batch."""
    environments: Mapping[str, EnvironmentStats] = field(default_factory=dict)
    """Name of an environment -> its steps and failures since the last batch, of whichever batch."""


class Tally:
    """Counts since the last batch; times are those of the running event loop, which a simulation sets.

    Args:
        rules: Of the run.
    """

    def __init__(self, rules: FlowRules) -> None:
        self._rules = rules
        self._generating = 0
        self._generating_since = self._started = self._last_rollout = 0.0
        self._since: float | None = None
        self._clear(carried=0)

    def _clear(self, carried: int) -> None:
        self._failures: Counter[str] = Counter()
        self._environments: dict[str, EnvironmentStats] = {}
        self._equal = self._generated_tokens = 0
        self._generating_s = 0.0
        self._carried_before = carried

    def restart(self, carried: int) -> None:
        """Reset the counts; ``carried`` is what the ledger has counted until now."""
        self._clear(carried)
        self._since = self._generating_since = now()

    def begin(self) -> None:
        """A batch is waited for from now on."""
        self._started = self._last_rollout = now()
        if self._since is None:
            self._since = self._started

    def collected(self, groups: Sequence[ScoredGroup], *, carried: int, spans: Sequence[TraceSpan]) -> Collected:
        """The batch that was waited for, and how it came about; resets the counts."""
        ended, since = now(), self._started if self._since is None else self._since
        collected = Collected(
            groups=tuple(sorted(groups, key=lambda scored: scored.group.group_id)),
            failures=self._failures,
            equal_reward_groups=self._equal,
            carried_groups=carried - self._carried_before,
            rollout_s=max(0.0, self._last_rollout - self._started),
            reward_s=ended - max(self._started, self._last_rollout),
            generated_tokens=self._generated_tokens,
            generating_s=self._generating_s + (ended - self._generating_since if self._generating else 0.0),
            elapsed_s=ended - since,
            spans=tuple(spans),
            environments=self._environments,
        )
        self.restart(carried)
        return collected

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Add to the time in which replicas have work."""
        if self._generating == 0:
            self._generating_since = now()
        self._generating += 1
        try:
            yield
        finally:
            self._generating -= 1
            if self._generating == 0:
                self._generating_s += now() - self._generating_since

    def rolled_out(self, group: RolloutGroup) -> None:
        """A rollout is finished."""
        self._generated_tokens += sum(trajectory.num_sampled for trajectory in group.trajectories)
        self._last_rollout = now()

    def stepped(self, environment: str, stats: EnvironmentStats) -> None:
        """Add what an environment did: a step, or all steps of an episode."""
        self._environments[environment] = self._environments.get(environment, EnvironmentStats()) + stats

    def equal_rewards(self, last: ScoredGroup, *, kept: int) -> None:
        """A group is dropped because its rewards are all equal (dynamic sampling).

        Raises:
            RewardError: It is one too many.
        """
        self._equal += 1
        limit = self._rules.max_equal_groups
        if limit is not None and self._equal > limit:
            raise RewardError(
                f"dynamic sampling dropped {self._equal} groups of one iteration, whose rewards were all equal, and "
                f"kept {kept} of {self._rules.batch_size}; the limit is rollouts.max_dropped_groups = {limit}. The "
                f"last had {len(last.rewards)} rewards of {last.rewards[0]:g}: check the reward function, take "
                "prompts that are sometimes solved, or raise rollouts.group_size"
            )

    def failed(self, failure: RewardFailure) -> None:
        """A group is dropped because its reward or its environment failed.

        Raises:
            RewardError: It is one too many.
        """
        if failure.environment:
            self.stepped(failure.environment, EnvironmentStats(failures={failure.kind: 1}))
        else:
            self._failures[failure.kind] += 1
        counts = self._failure_counts()
        # The first of a kind in an iteration; the rest are in its metrics.
        level = logging.WARNING if counts[_source(failure)] == 1 else logging.DEBUG
        message = "group %d is dropped, its %s failed (%s): %s"
        what = "environment" if failure.environment else "reward"
        _LOG.log(level, message, failure.group_id, what, _source(failure), failure.message)
        if counts.total() > self._rules.max_failures:
            told = ", ".join(f"{count} {source}" for source, count in counts.items())
            raise RewardError(
                f"{counts.total()} groups of one iteration could not be scored ({told}); "
                f"the limit is rewards.max_failures = {self._rules.max_failures}. Last: {failure.message}"
            )

    def _failure_counts(self) -> Counter[str]:
        """Failures since the last batch, by :func:`_source`."""
        of_environments = {
            f"{name}: {kind}": count
            for name, stats in self._environments.items()
            for kind, count in stats.failures.items()
        }
        return self._failures + Counter(of_environments)


def _source(failure: RewardFailure) -> str:
    """``timeout`` of a reward function, ``guess: timeout`` of an environment."""
    return f"{failure.environment}: {failure.kind}" if failure.environment else failure.kind


def log_failures(failures: Iterable[RewardFailure]) -> None:
    """Say why rewards failed that no batch is made of: the first of each kind, the rest are in the metrics."""
    first: dict[str, RewardFailure] = {}
    for failure in failures:
        first.setdefault(_source(failure), failure)
    for source, failure in first.items():
        _LOG.warning("group %d has no reward (%s): %s", failure.group_id, source, failure.message)


def now() -> float:
    """Seconds on the clock of the running event loop."""
    return asyncio.get_running_loop().time()
