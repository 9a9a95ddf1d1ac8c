"""The rollout flow: prompts -> rollouts -> rewards -> scored groups, in order, on one asyncio loop.

Consumes prompts and the policy version; produces batches of scored groups, oldest first. It admits groups by the
staleness rule (admission.py) whenever there is capacity, also while the learners compute, has each rolled out
(rollouter.py), and passes what is finished to the reward stage. The Algorithm runs it in a thread (controller.py), the
simulation on a clock of its own.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from rlhf_ray.config.settings import Settings
from rlhf_ray.errors import DataError, RolloutError
from rlhf_ray.rollouts.admission import FlowRules, GroupLedger
from rlhf_ray.rollouts.rollouter import Engine, Requests, Rollouter, Seeds
from rlhf_ray.rollouts.streams import cancel_all
from rlhf_ray.rollouts.tally import Collected, Tally, log_failures, now
from rlhf_ray.types import Prompt, PromptPosition, RewardFailure, RolloutGroup, SamplingSettings, ScoredGroup

__all__ = ["RolloutFlow", "training_sampling"]


class Prompts(Iterator[Prompt], Protocol):
    """What the flow needs of the stream of training prompts, which is endless."""

    def state(self) -> PromptPosition:
        """Which prompts were handed out."""
        ...


class Scorer(Protocol):
    """What the flow needs of the reward stage."""

    async def score(self, group: RolloutGroup) -> ScoredGroup | RewardFailure:
        """Score a group, or say why it cannot be scored."""
        ...


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
        prompts: Prompts,
        rules: FlowRules,
    ) -> None:
        self._rollouter = rollouter
        self.engine = engine
        self._scorer = scorer
        self._prompts = prompts
        self._sampling = engine.sampling
        self._greedy = replace(engine.sampling, group_size=1, temperature=0.0)
        self._rules = rules
        self._ledger: GroupLedger[ScoredGroup] = GroupLedger(rules)
        self._tally = Tally(rules)
        self._in_flight: dict[asyncio.Task[ScoredGroup | RewardFailure], _InFlight] = {}
        # Prompts of groups that were cancelled: the next ones to be admitted.
        self._requeued: deque[Prompt] = deque()
        self._error: BaseException | None = None
        self._changed = asyncio.Event()
        engine.requests.on_step = self._changed.set
        # One that is cancelled ends what it had in flight before the next begins, which would wait for that.
        self._collecting = asyncio.Lock()
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
        self._tally.begin()
        if self._rules.max_staleness == 0:
            self._ledger.version = version
        try:
            self._admit()
            while (groups := self._next_batch(version)) is None:
                await self._wait_for_change()
        except BaseException:
            await self._cancel_all()
            raise
        for name, stats in self.engine.requests.take_environments().items():
            self._tally.stepped(name, stats)
        return self._tally.collected(groups, carried=self._ledger.carried, spans=self.engine.requests.spans.take())

    def unfinished(self, version: int) -> list[int]:
        """Ids of the prompts that were taken and that policy ``version`` and those before it were not trained on."""
        collected = () if self._last is None or self._last[0] < version else self._last[1].groups
        waiting = (*collected, *self._ledger.waiting())
        prompts = [scored.group.prompt for scored in waiting] + [group.prompt for group in self._in_flight.values()]
        return [prompt.prompt_id for prompt in (*prompts, *self._requeued)]

    async def position(self, version: int) -> PromptPosition:
        """Where a run that stops now, with policy ``version``, resumes: no prompt is left out or trained on twice."""
        position = self._prompts.state()
        unfinished = {*position.unfinished, *self.unfinished(version)}
        return replace(position, unfinished=tuple(sorted(unfinished)))

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
            group = _InFlight(self._ledger.admit(), prompt, self._ledger.version, now(), unfinished=rollouts)
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
            self._tally.failed(outcome)
        elif self._rules.max_equal_groups is not None and np.ptp(outcome.rewards) == 0.0:
            self._ledger.reject(group.ticket)
            self._tally.equal_rewards(outcome, kept=self._ledger.ready)
        else:
            self._ledger.accept(group.ticket, outcome)

    async def _cancel_all(self) -> None:
        """End what is in flight; its prompts are the first to be sent again."""
        groups, self._in_flight = self._in_flight, {}
        self._error = None
        self._tally.restart(self._ledger.carried)
        self.engine.requests.spans.take()
        self.engine.requests.take_environments()
        for group in groups.values():
            self._ledger.reject(group.ticket)
        self._requeued.extendleft(group.prompt for group in reversed(groups.values()))
        await cancel_all(groups)

    async def score_prompts(
        self, prompts: Sequence[Prompt], sampling: SamplingSettings, version: int
    ) -> tuple[ScoredGroup | RewardFailure, ...]:
        """Roll out and score the given prompts (evaluation), in their order; counts for no update."""
        apart = Requests()  # What environments do here is no part of the next batch's metrics.
        # As many trajectories at once as in training.
        trajectories = self._rules.max_concurrent * self._sampling.group_size
        limit = asyncio.Semaphore(max(1, trajectories // sampling.group_size))

        async def one(prompt: Prompt) -> ScoredGroup | RewardFailure:
            async with limit:
                rollout = await self._rollout(prompt, sampling, version, apart)
                return rollout if isinstance(rollout, RewardFailure) else await self._scorer.score(rollout)

        tasks = [asyncio.create_task(one(prompt)) for prompt in prompts]
        try:
            outcomes = tuple(await asyncio.gather(*tasks))
        finally:
            await cancel_all(tasks)
            self.engine.requests.retries += apart.retries
            self.engine.requests.spans.add(*apart.spans.take())
        log_failures(outcome for outcome in outcomes if isinstance(outcome, RewardFailure))
        return outcomes

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
        with self._tally.generating():
            rollout = await self._rollout(group.prompt, sampling, group.version)
        group.unfinished -= 1
        if isinstance(rollout, RewardFailure):
            return rollout
        self._tally.rolled_out(rollout)
        if sampling is self._sampling:
            self._ledger.written(group.ticket)
        self._changed.set()
        return await self._scorer.score(rollout)

    async def _rollout(
        self, prompt: Prompt, sampling: SamplingSettings, version: int, requests: Requests | None = None
    ) -> RolloutGroup | RewardFailure:
        requests = requests or self.engine.requests
        engine = replace(self.engine, sampling=sampling, version=version, requests=requests)
        seeds = Seeds(run_seed=self._rules.seed, version=version, prompt_id=prompt.prompt_id)
        return await self._rollouter.rollout(prompt, engine, seeds)

    def _what_is_waited_for(self) -> str:
        rules = self._rules
        stages = Counter(group.stage for group in self._in_flight.values())
        waiting = ", ".join(f"{count} to be {stage}" for stage, count in stages.items()) or "none in flight"
        oldest = min(self._in_flight.values(), key=lambda group: group.started, default=None)
        if oldest is not None:
            waiting += (
                f"; the oldest is prompt {oldest.prompt.prompt_id}, sent {now() - oldest.started:.0f} s ago at policy "
                f"version {oldest.version}, to be {oldest.stage}"
            )
        return (
            f"no rollout made progress for rollouts.stall_timeout_s = {rules.stall_timeout_s:g} s. Policy version "
            f"{self._ledger.version} has {self._ledger.ready} scored groups of {rules.batch_size} and waits for "
            f"groups: {waiting}"
        )
