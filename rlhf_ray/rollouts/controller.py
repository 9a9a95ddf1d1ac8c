"""Keeps rollouts in flight: prompts -> replicas -> rewards -> scored groups, in order.

An asyncio loop in a thread of the Algorithm. It consumes prompts and the policy version, admits groups by the
staleness rule, sends a group again whose replica died, passes finished groups to the reward pool and hands scored
groups to the Algorithm, oldest first.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np

from rlhf_ray.errors import RewardError, RolloutError
from rlhf_ray.rollouts.seeds import group_seed
from rlhf_ray.types import Prompt, RewardFailure, RolloutGroup, SamplingSettings, ScoredGroup

__all__ = ["Collected", "RolloutController", "admission_capacity"]

_LOG = logging.getLogger(__name__)
_RETRY_PAUSE_S = 1.0

Result = TypeVar("Result")
Generate = Callable[..., Awaitable[RolloutGroup]]


class Scorer(Protocol):
    """What the controller needs of the reward pool."""

    async def score(self, group: RolloutGroup) -> ScoredGroup | RewardFailure:
        """Score a group, or say why it cannot be scored."""
        ...


def admission_capacity(
    *, batch_size: int, max_staleness: int, version: int, max_concurrent: int, running: int, accepted: int
) -> int:
    """Groups that may be submitted now (AReaL, arXiv:2505.24298, section 5.1).

    ``min(max_concurrent - running, (max_staleness + version + 1) * batch_size - (accepted + running))``: with
    ``accepted`` groups finished since the start and ``running`` in flight, no group can be more than
    ``max_staleness`` versions old when it is trained on. ``max_staleness = 0`` is synchronous PPO.
    """
    room = (max_staleness + version + 1) * batch_size - (accepted + running)
    return max(0, min(max_concurrent - running, room))


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """One batch of scored groups and how it came about."""

    groups: tuple[ScoredGroup, ...]
    """Sorted by ``group_id``."""
    failures: Counter[str]
    """Groups dropped because their reward failed, by kind."""
    equal_reward_groups: int
    """Groups dropped because their rewards were all equal (dynamic sampling)."""
    retries: int
    """Groups sent again because their replica died."""
    rollout_s: float
    """From the first submission to the last completion."""
    reward_s: float
    """From the last completion to the last reward: what rewards add to the rollout."""


class RolloutController:
    """Drives rollouts and rewards for the Algorithm's thread.

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
        greedy_baseline: Whether every group also gets a greedy completion and its reward.
        timeout_s: Longest wait for one group.
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
        greedy_baseline: bool,
        timeout_s: float,
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
        self._seed = seed
        self._accepted = 0
        self._retries = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout-controller", daemon=True)
        self._thread.start()

    def collect(self, version: int) -> Collected:
        """Return the next batch of scored groups, sampled by policy ``version`` or within the staleness bound.

        Raises:
            RewardError: More than ``max_failures`` groups could not be scored, or more than ``max_equal_groups`` had
                equal rewards.
            RolloutError: A group failed ``max_retries`` times or took longer than ``timeout_s``.
        """
        return self._run(self._collect(version))

    def score_prompts(
        self, prompts: Sequence[Prompt], sampling: SamplingSettings, version: int
    ) -> tuple[ScoredGroup | RewardFailure, ...]:
        """Sample and score the given prompts (evaluation), in their order; counts for no update."""
        return self._run(self._score_prompts(prompts, sampling, version))

    def resume(self, version: int) -> None:
        """Continue a restored run at ``version``: earlier versions' groups count as accepted."""
        self._accepted = version * self._batch_size

    def stop(self) -> None:
        """Cancel what is in flight and end the thread."""
        if not self._thread.is_alive():
            return

        async def cancel() -> None:
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(cancel(), self._loop).result(timeout=10.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10.0)
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:  # also Ctrl-C in this thread: nothing may go on in the other one
            future.cancel()
            raise

    async def _collect(self, version: int) -> Collected:
        started = time.perf_counter()
        retries_before = self._retries
        batch: list[ScoredGroup] = []
        failures: Counter[str] = Counter()
        equal = 0
        self._last_completion = started
        done: set[asyncio.Task[ScoredGroup | RewardFailure]] = set()
        pending: set[asyncio.Task[ScoredGroup | RewardFailure]] = set()
        try:
            while len(batch) < self._batch_size:
                pending |= self._admit(version, running=len(pending))
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for outcome in (task.result() for task in done):
                    if isinstance(outcome, RewardFailure):
                        self._count_failure(outcome, failures)
                    elif self._max_equal_groups is not None and np.ptp(outcome.rewards) == 0.0:
                        equal += 1
                        self._check_equal(equal, len(batch), outcome)
                    else:
                        self._accepted += 1
                        batch.append(outcome)
        finally:
            # Also the finished ones: of several that fail at once only the first error is raised.
            await _cancel(pending | done)
        ended = time.perf_counter()
        return Collected(
            groups=tuple(sorted(batch, key=lambda scored: scored.group.group_id)),
            failures=failures,
            equal_reward_groups=equal,
            retries=self._retries - retries_before,
            rollout_s=self._last_completion - started,
            reward_s=ended - self._last_completion,
        )

    def _admit(self, version: int, running: int) -> set[asyncio.Task[ScoredGroup | RewardFailure]]:
        capacity = admission_capacity(
            batch_size=self._batch_size,
            max_staleness=self._max_staleness,
            version=version,
            max_concurrent=self._max_concurrent,
            running=running,
            accepted=self._accepted,
        )
        # All of them before the first task: a stream that fails must leave nothing running.
        sampled = [next(self._prompts) for _ in range(capacity)]
        return {asyncio.create_task(self._training_rollout(prompt, version)) for prompt in sampled}

    async def _score_prompts(
        self, prompts: Sequence[Prompt], sampling: SamplingSettings, version: int
    ) -> tuple[ScoredGroup | RewardFailure, ...]:
        self._last_completion = time.perf_counter()
        limit = asyncio.Semaphore(self._max_concurrent * max(1, self._sampling.group_size // sampling.group_size))

        async def one(prompt: Prompt) -> ScoredGroup | RewardFailure:
            async with limit:
                return await self._rollout(prompt, sampling, version)

        tasks = {asyncio.create_task(one(prompt)): None for prompt in prompts}
        try:
            return tuple(await asyncio.gather(*tasks))
        finally:
            await _cancel(set(tasks))

    async def _training_rollout(self, prompt: Prompt, version: int) -> ScoredGroup | RewardFailure:
        if self._greedy is None:
            return await self._rollout(prompt, self._sampling, version)
        both = [asyncio.create_task(self._rollout(prompt, s, version)) for s in (self._sampling, self._greedy)]
        try:
            sampled, greedy = await asyncio.gather(*both)
        finally:
            await _cancel(set(both))  # One that failed must leave nothing running.
        if isinstance(sampled, RewardFailure) or isinstance(greedy, RewardFailure):
            return sampled if isinstance(sampled, RewardFailure) else greedy
        return replace(sampled, greedy_reward=float(greedy.rewards[0]))

    async def _rollout(self, prompt: Prompt, sampling: SamplingSettings, version: int) -> ScoredGroup | RewardFailure:
        group = await self._generate_with_retry(prompt, sampling, version)
        self._last_completion = time.perf_counter()
        # Replicas need not send the row's columns back.
        return await self._scorer.score(replace(group, prompt=prompt))

    async def _generate_with_retry(self, prompt: Prompt, sampling: SamplingSettings, version: int) -> RolloutGroup:
        seed = group_seed(self._seed, version, prompt.prompt_id)
        bare = replace(prompt, columns={}, text="")
        for attempt in range(self._max_retries + 1):
            try:
                async with asyncio.timeout(self._timeout_s):
                    return await self._generate(bare, sampling, seed=seed, min_version=version - self._max_staleness)
            except TimeoutError:
                raise RolloutError(
                    f"prompt {prompt.prompt_id} was not completed within rollouts.timeout_s = {self._timeout_s:g} s"
                ) from None
            except _replica_errors() as error:
                if attempt == self._max_retries:
                    raise RolloutError(
                        f"prompt {prompt.prompt_id} failed {attempt + 1} times, last with {error!r}"
                    ) from error
                self._retries += 1
                _LOG.warning("prompt %d is sent again, its replica failed: %r", prompt.prompt_id, error)
                await asyncio.sleep(_RETRY_PAUSE_S)
        raise AssertionError("unreachable")

    def _check_equal(self, equal: int, kept: int, last: ScoredGroup) -> None:
        assert self._max_equal_groups is not None
        if equal > self._max_equal_groups:
            raise RewardError(
                f"dynamic sampling dropped {equal} groups of one iteration, whose rewards were all equal, and kept "
                f"{kept} of {self._batch_size}; the limit is rollouts.max_dropped_groups = {self._max_equal_groups}. "
                f"The last had {len(last.rewards)} rewards of {last.rewards[0]:g}: check the reward function, take "
                "prompts that are sometimes solved, or raise rollouts.group_size"
            )

    def _count_failure(self, failure: RewardFailure, failures: Counter[str]) -> None:
        failures[failure.kind] += 1
        _LOG.warning("group %d is dropped, its reward failed (%s): %s", failure.group_id, failure.kind, failure.message)
        if failures.total() > self._max_failures:
            counts = ", ".join(f"{count} {kind}" for kind, count in failures.items())
            raise RewardError(
                f"{failures.total()} groups of one iteration could not be scored ({counts}); "
                f"the limit is rewards.max_failures = {self._max_failures}. Last: {failure.message}"
            )


async def _cancel(tasks: set[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _replica_errors() -> tuple[type[BaseException], ...]:
    """What a call raises when its replica died or its engine did; anything else is a defect and propagates."""
    from ray.exceptions import RayActorError, RayTaskError, WorkerCrashedError
    from ray.serve.exceptions import RequestCancelledError

    return (RayActorError, RayTaskError, WorkerCrashedError, RequestCancelledError)
