"""The rollout controller's work (stages 1 to 3): prompts -> replicas -> rewards -> scored groups, in order.

All of it on one asyncio loop: it consumes prompts and the policy version, admits groups by the staleness rule
(admission.py) whenever there is room, also while the learners compute, sends a group again whose replica died, passes
finished groups to the reward pool and hands out scored groups, oldest first. The Algorithm runs it in a thread
(controller.py), the simulation on a clock of its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from rlhf_ray.errors import DataError, RewardError, RolloutError
from rlhf_ray.rollouts.admission import GroupLedger
from rlhf_ray.rollouts.cancelling import cancel_all
from rlhf_ray.rollouts.seeds import group_seed
from rlhf_ray.types import Prompt, RewardFailure, RolloutGroup, SamplingSettings, ScoredGroup, TraceSpan
from rlhf_ray.untrusted_text import shortened

__all__ = ["Collected", "RolloutFlow"]

_LOG = logging.getLogger(__name__)
_RETRY_PAUSE_S = 1.0

Generate = Callable[..., Awaitable[RolloutGroup]]


class Scorer(Protocol):
    """What the flow needs of the reward pool."""

    async def score(self, group: RolloutGroup) -> ScoredGroup | RewardFailure:
        """Score a group, or say why it cannot be scored."""
        ...


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
    """How long the batch was waited for, to the last completion."""
    reward_s: float
    """How long it was waited for after that: what rewards add to the rollout."""
    generated_tokens: int
    """Trajectory tokens that replicas wrote since the last batch, for whichever one."""
    generating_s: float
    """Time since the last batch with a group at the replicas."""
    elapsed_s: float
    """All of the time since the last batch."""
    spans: tuple[TraceSpan, ...]
    """What replicas wrote since the last batch."""


@dataclass(slots=True)
class _InFlight:
    """A group that was admitted, and where it is."""

    ticket: int
    prompt: Prompt
    version: int
    started: float
    unwritten: int
    """Requests at the replicas: the group's own and that of the greedy completion."""

    @property
    def stage(self) -> str:
        """What is still to be done with it."""
        return "generated" if self.unwritten else "scored"


class RolloutFlow:
    """Drives rollouts and rewards; use it on one event loop.

    Args:
        generate: ``generate(prompt, sampling, seed=, min_version=)`` -> group, awaited.
        scorer: The reward pool.
        prompts: Endless prompts of training.
        sampling: How completions are drawn in training.
        batch_size: Groups an update.
        max_staleness: Versions that a group may lag behind.
        max_concurrent: Groups in flight at once.
        max_retries: Times a group is sent again.
        max_failures: Failed rewards in one batch before :class:`RewardError`.
        max_equal_groups: Dynamic sampling: groups of equal rewards dropped in one batch before :class:`RewardError`;
            none: such groups are kept.
        partial_rollouts: Whether a group in its last version is carried over instead of waited for.
        greedy_baseline: Whether every group also gets a greedy completion and its reward.
        timeout_s: Longest wait for one group.
        stall_timeout_s: Longest wait without any group getting further.
        seed: The run's seed.
    """

    def __init__(
        self,
        *,
        generate: Generate,
        scorer: Scorer,
        prompts: Iterator[Prompt],
        sampling: SamplingSettings,
        batch_size: int,
        max_staleness: int,
        max_concurrent: int,
        max_retries: int,
        max_failures: int,
        max_equal_groups: int | None,
        partial_rollouts: bool,
        greedy_baseline: bool,
        timeout_s: float,
        stall_timeout_s: float,
        seed: int,
    ) -> None:
        self._generate = generate
        self._scorer = scorer
        self._prompts = prompts
        self._sampling = sampling
        self._batch_size = batch_size
        self._max_staleness = max_staleness
        self._max_concurrent = max_concurrent
        self._max_retries = max_retries
        self._max_failures = max_failures
        self._max_equal_groups = max_equal_groups
        self._greedy = replace(sampling, group_size=1, temperature=0.0) if greedy_baseline else None
        self._timeout_s = timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._seed = seed
        self._ledger: GroupLedger[ScoredGroup] = GroupLedger(
            batch_size=batch_size,
            max_staleness=max_staleness,
            max_concurrent=max_concurrent,
            carries=partial_rollouts,
        )
        self._in_flight: dict[asyncio.Task[ScoredGroup | RewardFailure], _InFlight] = {}
        # Prompts of groups that were cancelled: the next ones to be admitted.
        self._again: deque[Prompt] = deque()
        self._error: BaseException | None = None
        self._changed = asyncio.Event()
        # One that is cancelled ends what it had in flight before the next begins, which would wait for that.
        self._collecting = asyncio.Lock()
        self._failures: Counter[str] = Counter()
        self._equal = 0
        self._carried_before = 0
        self.retries = 0
        """Groups sent again because their replica died, evaluation included, since the start."""
        self._generating = 0
        self._generating_since = 0.0
        self._generating_s = 0.0
        self._last_completion = 0.0
        self._generated_tokens = 0
        self._counted_from: float | None = None
        self._spans: list[TraceSpan] = []
        self._last: tuple[int, Collected] | None = None

    async def restart(self, version: int) -> None:
        """Continue a restored run at ``version``: earlier versions have their groups, others are forgotten."""
        async with self._collecting:
            self._last = None
            await self._cancel_all()
            self._again.clear()
            self._ledger.restart(version)

    async def collect(self, version: int) -> Collected:
        """Return the next batch of scored groups, sampled by policy ``version`` or within the staleness bound.

        Asked again for the same version, because what came after it failed, it returns the same batch. After an error
        nothing is in flight; groups that were scored by then are in the next batch, and the prompts of the others are
        the next ones that are sent.

        Raises:
            RewardError: More than ``max_failures`` groups could not be scored, or more than ``max_equal_groups`` had
                equal rewards.
            RolloutError: A group failed ``max_retries`` times or took longer than ``timeout_s``, or no group got
                further for ``stall_timeout_s``.
        """
        async with self._collecting:
            return await self._collect(version)

    async def _collect(self, version: int) -> Collected:
        if self._last is not None and self._last[0] == version:
            return self._last[1]
        started = _now()
        self._last_completion = started
        if self._counted_from is None:
            self._counted_from = started
        if self._max_staleness == 0:
            self._ledger.version = version
        try:
            self._admit()
            while (groups := self._next_batch(version)) is None:
                await self._wait_for_change()
        except BaseException:
            await self._cancel_all()
            raise
        ended = _now()
        collected = Collected(
            groups=tuple(sorted(groups, key=lambda scored: scored.group.group_id)),
            failures=self._failures,
            equal_reward_groups=self._equal,
            carried_groups=self._ledger.carried - self._carried_before,
            rollout_s=max(0.0, self._last_completion - started),
            reward_s=ended - max(started, self._last_completion),
            generated_tokens=self._generated_tokens,
            generating_s=self._generating_time(ended),
            elapsed_s=ended - self._counted_from,
            spans=tuple(self._spans),
        )
        self._forget_counts()
        self._last = (version, collected)
        return collected

    def unfinished(self, version: int) -> list[int]:
        """Ids of the prompts that were taken and that policy ``version`` and those before it were not trained on."""
        collected = () if self._last is None or self._last[0] < version else self._last[1].groups
        waiting = (*collected, *self._ledger.waiting())
        prompts = [scored.group.prompt for scored in waiting] + [group.prompt for group in self._in_flight.values()]
        return [prompt.prompt_id for prompt in (*prompts, *self._again)]

    def published(self, version: int) -> None:
        """Admit groups for a version, which every replica has by now; where none may be stale, ``collect`` does."""
        if self._max_staleness == 0:
            return
        self._ledger.version = version
        if self._error is None:
            try:
                self._admit()
            except BaseException as error:  # for whoever collects
                self._error = error

    def _next_batch(self, version: int) -> list[ScoredGroup] | None:
        if self._error is not None:
            raise self._error
        return self._ledger.batch(version)

    async def _wait_for_change(self) -> None:
        if not self._in_flight and not self._changed.is_set():
            raise RolloutError(self._what_is_waited_for())
        try:
            async with asyncio.timeout(self._stall_timeout_s):
                await self._changed.wait()
        except TimeoutError:
            raise RolloutError(self._what_is_waited_for()) from None
        self._changed.clear()

    def _admit(self) -> None:
        """Put groups in flight while there is room."""
        sampled: list[Prompt] = []
        try:
            for _ in range(self._ledger.capacity()):
                sampled.append(self._next_prompt())
        except BaseException:
            # Nothing was started, and nothing that was read is lost.
            self._again.extendleft(reversed(sampled))
            raise
        requests = 1 if self._greedy is None else 2
        for prompt in sampled:
            group = _InFlight(self._ledger.admit(), prompt, self._ledger.version, _now(), unwritten=requests)
            task = asyncio.create_task(self._training_rollout(group))
            self._in_flight[task] = group
            task.add_done_callback(self._ended)

    def _next_prompt(self) -> Prompt:
        if self._again:
            return self._again.popleft()
        try:
            return next(self._prompts)
        except StopIteration:
            raise DataError("the stream of training prompts has ended; it must be endless") from None

    def _ended(self, task: asyncio.Task[ScoredGroup | RewardFailure]) -> None:
        """Book a group that ended; what it leaves room for is admitted at once, learners computing or not."""
        group = self._in_flight.pop(task, None)
        if group is None:  # Cancelled on purpose.
            return
        self._changed.set()
        # Errors are for whoever collects; asyncio would only log them.
        try:
            outcome = task.result()
        except BaseException as error:
            self._ledger.reject(group.ticket)
            self._again.append(group.prompt)
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
        elif self._max_equal_groups is not None and np.ptp(outcome.rewards) == 0.0:
            self._ledger.reject(group.ticket)
            self._count_equal(outcome)
        else:
            self._ledger.accept(group.ticket, outcome)

    async def _cancel_all(self) -> None:
        """End what is in flight; its prompts are the first to be sent again."""
        groups = self._in_flight
        self._in_flight = {}
        self._error = None
        self._forget_counts()
        for group in groups.values():
            self._ledger.reject(group.ticket)
        self._again.extendleft(group.prompt for group in reversed(groups.values()))
        await cancel_all(groups)

    def _forget_counts(self) -> None:
        self._failures = Counter()
        self._equal = 0
        self._carried_before = self._ledger.carried
        self._generated_tokens = 0
        self._generating_s = 0.0
        self._generating_since = self._counted_from = _now()
        self._spans = []

    def _generating_time(self, now: float) -> float:
        return self._generating_s + (now - self._generating_since if self._generating else 0.0)

    def _what_is_waited_for(self) -> str:
        now = _now()
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
            f"no group got further for rollouts.stall_timeout_s = {self._stall_timeout_s:g} s. Policy version "
            f"{self._ledger.version} has {self._ledger.ready} scored groups of {self._batch_size} and waits for "
            f"groups: {waiting}{named}"
        )

    async def score_prompts(
        self, prompts: Sequence[Prompt], sampling: SamplingSettings, version: int
    ) -> tuple[ScoredGroup | RewardFailure, ...]:
        """Sample and score the given prompts (evaluation), in their order; counts for no update."""
        # As many completions at once as in training.
        completions = self._max_concurrent * self._sampling.group_size
        limit = asyncio.Semaphore(max(1, completions // sampling.group_size))

        async def one(prompt: Prompt) -> ScoredGroup | RewardFailure:
            async with limit:
                return await self._rollout(prompt, sampling, version)

        tasks = [asyncio.create_task(one(prompt)) for prompt in prompts]
        try:
            return tuple(await asyncio.gather(*tasks))
        finally:
            await cancel_all(tasks)

    async def _training_rollout(self, group: _InFlight) -> ScoredGroup | RewardFailure:
        if self._greedy is None:
            return await self._training_part(group, self._sampling)
        both = [asyncio.create_task(self._training_part(group, s)) for s in (self._sampling, self._greedy)]
        try:
            sampled, greedy = await asyncio.gather(*both)
        finally:
            await cancel_all(both)  # One that failed must leave nothing running.
        if isinstance(sampled, RewardFailure) or isinstance(greedy, RewardFailure):
            return sampled if isinstance(sampled, RewardFailure) else greedy
        return replace(sampled, greedy_reward=float(greedy.rewards[0]))

    async def _training_part(self, group: _InFlight, sampling: SamplingSettings) -> ScoredGroup | RewardFailure:
        with self._generating_now():
            written = await self._generate_with_retry(group.prompt, sampling, group.version)
        self._generated_tokens += sum(len(completion.token_ids) for completion in written.trajectories)
        group.unwritten -= 1
        if sampling is self._sampling:
            self._ledger.written(group.ticket)
        self._last_completion = _now()
        self._changed.set()
        return await self._score(written, group.prompt)

    async def _rollout(self, prompt: Prompt, sampling: SamplingSettings, version: int) -> ScoredGroup | RewardFailure:
        return await self._score(await self._generate_with_retry(prompt, sampling, version), prompt)

    async def _score(self, group: RolloutGroup, prompt: Prompt) -> ScoredGroup | RewardFailure:
        # Replicas need not send the row's columns back.
        return await self._scorer.score(replace(group, prompt=prompt))

    @contextmanager
    def _generating_now(self) -> Iterator[None]:
        """Add to the time in which replicas have work."""
        if self._generating == 0:
            self._generating_since = _now()
        self._generating += 1
        try:
            yield
        finally:
            self._generating -= 1
            if self._generating == 0:
                self._generating_s += _now() - self._generating_since

    async def _generate_with_retry(self, prompt: Prompt, sampling: SamplingSettings, version: int) -> RolloutGroup:
        seed = group_seed(self._seed, version, prompt.prompt_id)
        bare = replace(prompt, columns={}, text="")
        for attempt in range(self._max_retries + 1):
            started = _now()
            try:
                async with asyncio.timeout(self._timeout_s) as limit:
                    group = await self._generate(bare, sampling, seed=seed, min_version=version)
                lane, name = f"replica {group.replica_id}", f"group {prompt.prompt_id}"
                self._spans.append(TraceSpan.ending_now(lane, name, _now() - started))
                return group
            except TimeoutError:
                if not limit.expired():
                    raise
                raise RolloutError(
                    f"prompt {prompt.prompt_id} was not completed within rollouts.timeout_s = {self._timeout_s:g} s"
                ) from None
            except _replica_errors() as error:
                if isinstance(refusal := getattr(error, "cause", None), RolloutError):
                    raise refusal from error
                if attempt == self._max_retries:
                    raise RolloutError(
                        f"prompt {prompt.prompt_id} failed {attempt + 1} times, last with {shortened(repr(error))}"
                    ) from error
                self.retries += 1
                _LOG.warning(
                    "prompt %d is sent again, its replica failed: %s", prompt.prompt_id, shortened(repr(error))
                )
                await asyncio.sleep(_RETRY_PAUSE_S)
        raise AssertionError("unreachable")

    def _count_equal(self, last: ScoredGroup) -> None:
        assert self._max_equal_groups is not None
        self._equal += 1
        if self._equal > self._max_equal_groups:
            raise RewardError(
                f"dynamic sampling dropped {self._equal} groups of one iteration, whose rewards were all equal, and "
                f"kept {self._ledger.ready} of {self._batch_size}; the limit is rollouts.max_dropped_groups = "
                f"{self._max_equal_groups}. The last had {len(last.rewards)} rewards of {last.rewards[0]:g}: check the "
                "reward function, take prompts that are sometimes solved, or raise rollouts.group_size"
            )

    def _count_failure(self, failure: RewardFailure) -> None:
        self._failures[failure.kind] += 1
        # The first of a kind in an iteration; the rest are in its metrics.
        level = logging.WARNING if self._failures[failure.kind] == 1 else logging.DEBUG
        message = "group %d is dropped, its reward failed (%s): %s"
        _LOG.log(level, message, failure.group_id, failure.kind, failure.message)
        if self._failures.total() > self._max_failures:
            counts = ", ".join(f"{count} {kind}" for kind, count in self._failures.items())
            raise RewardError(
                f"{self._failures.total()} groups of one iteration could not be scored ({counts}); "
                f"the limit is rewards.max_failures = {self._max_failures}. Last: {failure.message}"
            )


def _now() -> float:
    """Seconds on the loop's clock, which a simulation sets."""
    return asyncio.get_running_loop().time()


def _replica_errors() -> tuple[type[BaseException], ...]:
    """What a call raises when its replica died or its engine did; anything else is a defect and propagates."""
    from ray.exceptions import ObjectLostError, RayActorError, RayTaskError, WorkerCrashedError
    from ray.serve.exceptions import RequestCancelledError

    return (ObjectLostError, RayActorError, RayTaskError, WorkerCrashedError, RequestCancelledError)
