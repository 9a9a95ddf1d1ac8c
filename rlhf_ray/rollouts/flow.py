"""The rollout flow: prompts -> rollouts -> rewards -> scored groups, in order, on one asyncio loop.

Consumes prompts and the policy version; produces batches of scored groups, oldest first. It admits groups by the
staleness rule (admission.py) whenever there is capacity, also while the learners compute, has each rolled out
(rollouter.py), and passes what is finished to the reward stage. The Algorithm runs it in a thread (controller.py), the
simulation on a clock of its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol, Self

import numpy as np

from rlhf_ray.config.settings import Settings
from rlhf_ray.errors import DataError, RewardError, RolloutError
from rlhf_ray.rollouts.admission import GroupLedger, max_concurrent_groups
from rlhf_ray.rollouts.cancelling import cancel_all
from rlhf_ray.rollouts.rollouter import Engine, Rollouter
from rlhf_ray.rollouts.seeds import Seeds
from rlhf_ray.types import Prompt, RewardFailure, RolloutGroup, SamplingSettings, ScoredGroup, TraceSpan

__all__ = ["Collected", "FlowRules", "RolloutFlow", "training_sampling"]

_LOG = logging.getLogger(__name__)


class Scorer(Protocol):
    """What the flow needs of the reward stage."""

    async def score(self, group: RolloutGroup) -> ScoredGroup | RewardFailure:
        """Score a group, or say why it cannot be scored."""
        ...


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


def training_sampling(settings: Settings) -> SamplingSettings:
    """How tokens are drawn in training."""
    rollouts = settings.rollouts
    return SamplingSettings(
        group_size=rollouts.group_size,
        max_new_tokens=rollouts.max_new_tokens,
        temperature=rollouts.temperature,
        top_p=rollouts.top_p,
        top_k=rollouts.top_k,
        stop=tuple(rollouts.stop),
        stop_token_ids=tuple(rollouts.stop_token_ids),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """One batch of scored groups and how it came about."""

    groups: tuple[ScoredGroup, ...]
    """Sorted by ``group_id``."""
    failures: Counter[str]
    """Groups dropped since the last batch because their reward failed, by kind."""
    equal_reward_groups: int
    """Groups dropped because their rewards were all equal (dynamic sampling)."""
    carried_groups: int
    """Groups in flight that the batch did not wait for in their last version (partial rollouts)."""
    rollout_s: float
    """How long the batch was waited for, to the last rollout."""
    reward_s: float
    """How long it was waited for after that: what rewards add to the rollout."""
    generated_tokens: int
    """Trajectory tokens finished since the last batch, whichever batch they are for."""
    generating_s: float
    """Time since the last batch with a group at the replicas."""
    elapsed_s: float
    """All of the time since the last batch."""
    spans: tuple[TraceSpan, ...]
    """What replicas generated since the last batch."""


@dataclass(slots=True)
class _InFlight:
    """A group that was admitted, and where it is."""

    ticket: int
    prompt: Prompt
    version: int
    started: float
    unfinished: int
    """Rollouts that are not finished: the group's own and the greedy one."""

    @property
    def stage(self) -> str:
        """What is still to be done with it."""
        return "generated" if self.unfinished else "scored"


@dataclass(slots=True)
class _Tally:
    """What happened since the last batch."""

    since: float | None = None
    """``None``: there was no batch yet, and none is waited for."""
    generating_since: float = 0.0
    """When the replicas last got work."""
    carried_before: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    equal: int = 0
    generated_tokens: int = 0
    generating_s: float = 0.0


class RolloutFlow:
    """Drives rollouts and rewards; use it on one event loop.

    Args:
        rollouter: The kind of rollout.
        engine: The replicas, with the sampling settings of training.
        scorer: The reward stage.
        prompts: Endless prompts of training.
        rules: How many groups at once, and how many may fail.
    """

    def __init__(
        self,
        *,
        rollouter: Rollouter,
        engine: Engine,
        scorer: Scorer,
        prompts: Iterator[Prompt],
        rules: FlowRules,
    ) -> None:
        self._rollouter = rollouter
        self.engine = engine
        self._scorer = scorer
        self._prompts = prompts
        self._sampling = engine.sampling
        self._greedy = replace(engine.sampling, group_size=1, temperature=0.0)
        self._rules = rules
        self._ledger: GroupLedger[ScoredGroup] = GroupLedger(
            batch_size=rules.batch_size,
            max_staleness=rules.max_staleness,
            max_concurrent=rules.max_concurrent,
            carries=rules.partial_rollouts,
        )
        self._in_flight: dict[asyncio.Task[ScoredGroup | RewardFailure], _InFlight] = {}
        # Prompts of groups that were cancelled: the next ones to be admitted.
        self._requeued: deque[Prompt] = deque()
        self._error: BaseException | None = None
        self._changed = asyncio.Event()
        # One that is cancelled ends what it had in flight before the next begins, which would wait for that.
        self._collecting = asyncio.Lock()
        self._generating = 0
        self._last_rollout = 0.0
        self._tally = _Tally()
        self._last: tuple[int, Collected] | None = None

    async def restart(self, version: int) -> None:
        """Continue a restored run at ``version``: earlier versions have their groups, others are forgotten."""
        async with self._collecting:
            self._last = None
            await self._cancel_all()
            self._requeued.clear()
            self._ledger.restart(version)

    async def collect(self, version: int) -> Collected:
        """Return the next batch of scored groups, sampled by policy ``version`` or within the staleness bound.

        Asked again for the same version, because what came after it failed, it returns the same batch. After an error
        nothing is in flight; groups that were scored by then are in the next batch, and the prompts of the others are
        the next ones that are sent.

        Raises:
            RewardError: More than ``max_failures`` groups could not be scored, or more than ``max_equal_groups`` had
                equal rewards.
            RolloutError: A rollout failed, or no group made progress for ``stall_timeout_s``.
        """
        async with self._collecting:
            if self._last is None or self._last[0] != version:
                self._last = version, await self._collect(version)
            return self._last[1]

    async def _collect(self, version: int) -> Collected:
        started = self._last_rollout = _now()
        if self._tally.since is None:
            self._tally.since = started
        if self._rules.max_staleness == 0:
            self._ledger.version = version
        try:
            self._admit()
            while (groups := self._next_batch(version)) is None:
                await self._wait_for_change()
        except BaseException:
            await self._cancel_all()
            raise
        ended, tally = _now(), self._new_tally()
        return Collected(
            groups=tuple(sorted(groups, key=lambda scored: scored.group.group_id)),
            failures=tally.failures,
            equal_reward_groups=tally.equal,
            carried_groups=self._ledger.carried - tally.carried_before,
            rollout_s=max(0.0, self._last_rollout - started),
            reward_s=ended - max(started, self._last_rollout),
            generated_tokens=tally.generated_tokens,
            generating_s=tally.generating_s + (ended - tally.generating_since if self._generating else 0.0),
            elapsed_s=ended - (started if tally.since is None else tally.since),
            spans=tuple(self.engine.requests.spans.take()),
        )

    def unfinished(self, version: int) -> list[int]:
        """Ids of the prompts that were taken and that policy ``version`` and those before it were not trained on."""
        collected = () if self._last is None or self._last[0] < version else self._last[1].groups
        waiting = (*collected, *self._ledger.waiting())
        prompts = [scored.group.prompt for scored in waiting] + [group.prompt for group in self._in_flight.values()]
        return [prompt.prompt_id for prompt in (*prompts, *self._requeued)]

    def published(self, version: int) -> None:
        """Admit groups for a version, which every replica has by now; where none may be stale, ``collect`` does."""
        if self._rules.max_staleness == 0:
            return
        self._ledger.version = version
        if self._error is None:
            try:
                self._admit()
            except BaseException as error:  # raised by the next collect
                self._error = error

    def _next_batch(self, version: int) -> list[ScoredGroup] | None:
        if self._error is not None:
            raise self._error
        return self._ledger.batch(version)

    async def _wait_for_change(self) -> None:
        if not self._in_flight and not self._changed.is_set():
            raise RolloutError(self._what_is_waited_for())
        try:
            async with asyncio.timeout(self._rules.stall_timeout_s):
                await self._changed.wait()
        except TimeoutError:
            raise RolloutError(self._what_is_waited_for()) from None
        self._changed.clear()

    def _admit(self) -> None:
        """Put groups in flight while there is capacity."""
        sampled: list[Prompt] = []
        try:
            for _ in range(self._ledger.capacity()):
                sampled.append(self._next_prompt())
        except BaseException:
            # Nothing was started, and nothing that was read is lost.
            self._requeued.extendleft(reversed(sampled))
            raise
        rollouts = 2 if self._rules.greedy_baseline else 1
        for prompt in sampled:
            group = _InFlight(self._ledger.admit(), prompt, self._ledger.version, _now(), unfinished=rollouts)
            task = asyncio.create_task(self._scored_group(group))
            self._in_flight[task] = group
            task.add_done_callback(self._ended)

    def _next_prompt(self) -> Prompt:
        if self._requeued:
            return self._requeued.popleft()
        try:
            return next(self._prompts)
        except StopIteration:
            raise DataError("the stream of training prompts has ended; it must be endless") from None

    def _ended(self, task: asyncio.Task[ScoredGroup | RewardFailure]) -> None:
        """Book a group that ended; its capacity is used at once, whether learners compute or not."""
        group = self._in_flight.pop(task, None)
        if group is None:  # Cancelled on purpose.
            return
        self._changed.set()
        # Errors are raised by collect; asyncio would only log them.
        try:
            outcome = task.result()
        except BaseException as error:
            self._ledger.reject(group.ticket)
            self._requeued.append(group.prompt)
            self._error = self._error or error
            return
        try:
            self._book(group, outcome)
            if self._error is None:
                self._admit()
        except BaseException as error:
            self._error = self._error or error

    def _book(self, group: _InFlight, outcome: ScoredGroup | RewardFailure) -> None:
        if isinstance(outcome, RewardFailure):
            self._ledger.reject(group.ticket)
            self._count_failure(outcome)
        elif self._rules.max_equal_groups is not None and np.ptp(outcome.rewards) == 0.0:
            self._ledger.reject(group.ticket)
            self._count_equal(outcome, self._rules.max_equal_groups)
        else:
            self._ledger.accept(group.ticket, outcome)

    async def _cancel_all(self) -> None:
        """End what is in flight; its prompts are the first to be sent again."""
        groups, self._in_flight = self._in_flight, {}
        self._error = None
        self._new_tally()
        self.engine.requests.spans.take()
        for group in groups.values():
            self._ledger.reject(group.ticket)
        self._requeued.extendleft(group.prompt for group in reversed(groups.values()))
        await cancel_all(groups)

    async def score_prompts(
        self, prompts: Sequence[Prompt], sampling: SamplingSettings, version: int
    ) -> tuple[ScoredGroup | RewardFailure, ...]:
        """Roll out and score the given prompts (evaluation), in their order; counts for no update."""
        # As many trajectories at once as in training.
        trajectories = self._rules.max_concurrent * self._sampling.group_size
        limit = asyncio.Semaphore(max(1, trajectories // sampling.group_size))

        async def one(prompt: Prompt) -> ScoredGroup | RewardFailure:
            async with limit:
                return await self._scorer.score(await self._rollout(prompt, sampling, version))

        tasks = [asyncio.create_task(one(prompt)) for prompt in prompts]
        try:
            return tuple(await asyncio.gather(*tasks))
        finally:
            await cancel_all(tasks)

    async def _scored_group(self, group: _InFlight) -> ScoredGroup | RewardFailure:
        """A group of training with its rewards, that of the greedy trajectory included where one is asked for."""
        if not self._rules.greedy_baseline:
            return await self._scored(group, self._sampling)
        both = [asyncio.create_task(self._scored(group, sampling)) for sampling in (self._sampling, self._greedy)]
        try:
            sampled, greedy = await asyncio.gather(*both)
        finally:
            await cancel_all(both)  # One that failed must leave nothing running.
        if isinstance(sampled, RewardFailure) or isinstance(greedy, RewardFailure):
            return sampled if isinstance(sampled, RewardFailure) else greedy
        return replace(sampled, greedy_reward=float(greedy.rewards[0]))

    async def _scored(self, group: _InFlight, sampling: SamplingSettings) -> ScoredGroup | RewardFailure:
        with self._generating_now():
            rollout = await self._rollout(group.prompt, sampling, group.version)
        self._tally.generated_tokens += sum(len(trajectory.token_ids) for trajectory in rollout.trajectories)
        group.unfinished -= 1
        if sampling is self._sampling:
            self._ledger.written(group.ticket)
        self._last_rollout = _now()
        self._changed.set()
        return await self._scorer.score(rollout)

    async def _rollout(self, prompt: Prompt, sampling: SamplingSettings, version: int) -> RolloutGroup:
        engine = replace(self.engine, sampling=sampling, version=version)
        seeds = Seeds(run_seed=self._rules.seed, version=version, prompt_id=prompt.prompt_id)
        return await self._rollouter.rollout(prompt, engine, seeds)

    @contextmanager
    def _generating_now(self) -> Iterator[None]:
        """Add to the time in which replicas have work."""
        if self._generating == 0:
            self._tally.generating_since = _now()
        self._generating += 1
        try:
            yield
        finally:
            self._generating -= 1
            if self._generating == 0:
                self._tally.generating_s += _now() - self._tally.generating_since

    def _new_tally(self) -> _Tally:
        """Begin to count anew; returns what was counted since the last time."""
        now, tally = _now(), self._tally
        self._tally = _Tally(since=now, generating_since=now, carried_before=self._ledger.carried)
        return tally

    def _what_is_waited_for(self) -> str:
        now, rules = _now(), self._rules
        stages = Counter(group.stage for group in self._in_flight.values())
        waiting = ", ".join(f"{count} to be {stage}" for stage, count in stages.items()) or "none in flight"
        oldest = min(self._in_flight.values(), key=lambda group: group.started, default=None)
        named = (
            ""
            if oldest is None
            else f"; the oldest is prompt {oldest.prompt.prompt_id}, sent {now - oldest.started:.0f} s ago at policy "
            f"version {oldest.version}, to be {oldest.stage}"
        )
        return (
            f"no rollout made progress for rollouts.stall_timeout_s = {rules.stall_timeout_s:g} s. Policy version "
            f"{self._ledger.version} has {self._ledger.ready} scored groups of {rules.batch_size} and waits for "
            f"groups: {waiting}{named}"
        )

    def _count_equal(self, last: ScoredGroup, limit: int) -> None:
        self._tally.equal += 1
        if self._tally.equal > limit:
            raise RewardError(
                f"dynamic sampling dropped {self._tally.equal} groups of one iteration, whose rewards were all equal, "
                f"and kept {self._ledger.ready} of {self._rules.batch_size}; the limit is rollouts.max_dropped_groups "
                f"= {limit}. The last had {len(last.rewards)} rewards of {last.rewards[0]:g}: check the reward "
                "function, take prompts that are sometimes solved, or raise rollouts.group_size"
            )

    def _count_failure(self, failure: RewardFailure) -> None:
        failures, limit = self._tally.failures, self._rules.max_failures
        failures[failure.kind] += 1
        # The first of a kind in an iteration; the rest are in its metrics.
        level = logging.WARNING if failures[failure.kind] == 1 else logging.DEBUG
        message = "group %d is dropped, its reward failed (%s): %s"
        _LOG.log(level, message, failure.group_id, failure.kind, failure.message)
        if failures.total() > limit:
            counts = ", ".join(f"{count} {kind}" for kind, count in failures.items())
            raise RewardError(
                f"{failures.total()} groups of one iteration could not be scored ({counts}); "
                f"the limit is rewards.max_failures = {limit}. Last: {failure.message}"
            )


def _now() -> float:
    """Seconds on the loop's clock, which a simulation sets."""
    return asyncio.get_running_loop().time()
