"""Rewards, step three of the loop: rollout groups go to a pool of Ray actors and come back scored.

Consumes finished ``RolloutGroup``s; produces ``ScoredGroup``s or counted ``RewardFailure``s. A group waits for a free
worker, and no longer than ``rewards.timeout_s`` for its answer.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Coroutine, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from rlhf_ray.config.settings import RewardSettings
from rlhf_ray.errors import RewardError
from rlhf_ray.rewards.arguments import TrainingProgress
from rlhf_ray.rewards.functions import NamedReward, resolve_rewards
from rlhf_ray.rewards.scoring import Scores, Tokenizer
from rlhf_ray.rewards.shipping import pack, pack_rewards
from rlhf_ray.rewards.worker import LONG_CALL_S, ConcurrentRewardWorker, SequentialRewardWorker
from rlhf_ray.span_log import SpanLog
from rlhf_ray.stopping import stop_all
from rlhf_ray.types import RewardFailure, RolloutGroup, ScoredGroup, TraceSpan
from rlhf_ray.untrusted_text import shortened
from rlhf_ray.worker_env import worker_env

__all__ = ["START_TRIES", "RewardPool", "died_by_itself", "kill", "span_name"]

logger = logging.getLogger(__name__)

CONCURRENT_GROUPS = 16
"""Groups that one worker scores at once when all functions are async."""
DEATH_RETRIES = 1
"""Times a group is sent again after the worker that scored it died by itself."""
START_TRIES = 3
"""Times a worker is started that dies before it stands, with its node for example."""
BATCH_S = 0.05
"""Groups that are expected to be scored within so many seconds go to a worker in one call."""
MAX_BATCH = 64
SHUTDOWN_S = 5.0
"""Longest wait, in seconds, for running calls to notice that their workers were ended."""


@dataclass(slots=True, eq=False)
class _Worker:
    """A reward actor, as the pool sees it."""

    actor: Any
    number: int
    """Counted from 1, replacements included."""
    turn: asyncio.Semaphore
    """Held by the groups that the actor works on; those sent ahead wait for it, in the order they were sent."""
    retired: bool = False
    """Gets no more groups: it is dead or being killed."""
    killed: bool = False
    """The pool killed it; the other groups it worked on are not to blame."""


@dataclass(slots=True, eq=False)
class _Request:
    """A group that somebody waits for."""

    group: RolloutGroup
    outcome: asyncio.Future[ScoredGroup | RewardFailure]
    retries: int = DEATH_RETRIES
    alone: bool = False
    """A call that it was part of ended badly: it gets a worker of its own, to know which group was to blame."""


class RewardPool:
    """Reward actors with an enforced time limit.

    Quick functions get several groups a call, since a call costs a millisecond; a call of several that takes too long
    or kills its worker is repeated group by group.

    The pool keeps its books on an event loop in a thread of its own: :meth:`score` may be awaited on any loop, hundreds
    of times at once, and time limits hold while those loops are busy.

    Args:
        settings: The functions, how many workers, and the time limit.
        tokenizer_path: Folder or hub id of the tokenizer that turns completions into text.
        num_cpus: CPUs that Ray reserves for a worker.
        trust_remote_code: Run code that ships with the tokenizer.
        tokenizer: A tokenizer to send along instead of loading ``tokenizer_path``.
        startup_timeout_s: Longest wait for workers to start, in seconds.
        rewards: Those of ``settings`` that run here; none: all.
        part_of_sum: Reward models add to the sum, so that no function need apply to a completion.

    Attributes:
        failures: Groups that could not be scored since the start, by ``RewardFailure.kind``.
        workers_replaced: Workers that died, or were killed at the time limit, since the start.
        progress: What ``trainer_state`` of the functions follows from.

    Raises:
        ConfigError: A reward function or weight is wrong.
    """

    def __init__(
        self,
        settings: RewardSettings,
        *,
        tokenizer_path: str,
        num_cpus: float,
        trust_remote_code: bool,
        tokenizer: Tokenizer | None = None,
        startup_timeout_s: float = 300.0,
        rewards: Sequence[NamedReward] | None = None,
        part_of_sum: bool = False,
    ) -> None:
        if rewards is None:
            rewards = resolve_rewards(settings)
        concurrent = all(reward.is_async for reward in rewards)
        self.failures: Counter[str] = Counter()
        self.workers_replaced = 0
        self.progress = TrainingProgress()
        self._settings = settings
        self._num_cpus = num_cpus
        self._startup_timeout_s = startup_timeout_s
        self._worker_class = ConcurrentRewardWorker if concurrent else SequentialRewardWorker
        self._concurrency = CONCURRENT_GROUPS if concurrent else 1
        # A lone worker gets its next group while it works, which hides the way there and back. Of several, another may
        # be free before it.
        self._slots = self._concurrency + (1 if settings.num_workers == 1 else 0)
        source = tokenizer_path if tokenizer is None else pack(tokenizer, defined_by=tokenizer)
        self._worker_arguments = (pack_rewards(rewards), source, trust_remote_code, part_of_sum)
        self._workers: list[_Worker] = []
        self._waiting: deque[_Request] = deque()
        # One entry a free slot, oldest first.
        self._free: deque[_Worker] = deque()
        self._seconds_a_group: float | None = None
        self._starts = 0
        self._spans = SpanLog()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop: asyncio.AbstractEventLoop
        self._thread: threading.Thread | None = None
        self._closed: str | None = "the reward pool is not started"
        self._stopped = False
        # Held while a call enters the loop, so that none enters one that is being stopped and waits for ever.
        self._door = threading.Lock()

    def start(self) -> None:
        """Start the workers and wait until they stand.

        Raises:
            RewardError: They do not, within ``startup_timeout_s``; or the pool was started before.
        """
        with self._door:
            if self._stopped:
                raise RewardError("the reward pool is stopped")
            if self._thread is not None:
                raise RewardError("the reward pool was started before: make a new one")
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="reward-pool", daemon=True)
            self._thread.start()
            starting = [
                asyncio.run_coroutine_threadsafe(self._start_worker(), self._loop)
                for _ in range(self._settings.num_workers)
            ]
        try:
            workers = [start.result() for start in starting]
        except CancelledError as error:  # By stop(), in another thread.
            raise RewardError("the reward pool is stopped") from error
        except BaseException:
            self.stop()
            raise
        with self._door:
            if self._stopped:
                raise RewardError("the reward pool is stopped")
            self._closed = None
            self._loop.call_soon_threadsafe(self._offer, workers)

    async def score(self, group: RolloutGroup) -> ScoredGroup | RewardFailure:
        """Score ``group`` on the next free worker.

        Raises:
            RewardError: The pool is not started or is stopped, or its last worker could not be replaced.
            DataError: A dataset column has the name of an argument that has a value already.
        """
        with self._door:
            if self._closed is not None:
                raise RewardError(self._closed)
            scoring = asyncio.run_coroutine_threadsafe(self._score(group), self._loop)
        return await asyncio.wrap_future(scoring)

    def stop(self) -> None:
        """End the workers; groups that are being scored or wait for a worker raise ``RewardError``."""
        with self._door:
            # Of two threads that stop it, as where a start fails that is given up, one does: the loop of the other's
            # call may have ended before it came to it.
            is_over, self._stopped = self._stopped, True
            self._closed = "the reward pool is stopped"
        if is_over or self._thread is None:
            return
        stop_all(
            ("reward workers", asyncio.run_coroutine_threadsafe(self._shut_down(self._closed), self._loop).result),
            ("thread of the reward pool", partial(self._end_thread, self._thread)),
        )

    def _end_thread(self, thread: threading.Thread) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        thread.join()
        self._loop.close()

    def take_spans(self) -> list[TraceSpan]:
        """What each worker did since the last call."""
        return self._spans.take()

    async def _score(self, group: RolloutGroup) -> ScoredGroup | RewardFailure:
        if self._closed is not None:
            raise RewardError(self._closed)
        request = _Request(group=group, outcome=self._loop.create_future())
        if not self._waiting:
            # After all groups that come in this turn of the loop.
            self._loop.call_soon(self._send)
        self._waiting.append(request)
        return await request.outcome

    def _send(self) -> None:
        """Give waiting groups to free workers."""
        while self._free and (head := self._head()) is not None:
            # Nothing goes beside a group that is to be alone: whatever ends the worker then is of its making.
            slots = self._slots if head.alone else 1
            worker = next((worker for worker in self._free if self._free.count(worker) >= slots), None)
            if worker is None:
                return
            for _ in range(slots):
                self._free.remove(worker)
            # A task of the pool: when a caller gives up, the worker is still busy and its time limit must be kept.
            self._spawn(self._attempt(worker, self._next_batch(), slots))

    def _head(self) -> _Request | None:
        """The oldest group that somebody still waits for."""
        while self._waiting and self._waiting[0].outcome.done():  # its caller gave up
            self._waiting.popleft()
        return self._waiting[0] if self._waiting else None

    def _next_batch(self) -> list[_Request]:
        """The groups of the next call, oldest first; fewer than wait where there is work for several workers."""
        limit = 1
        if self._concurrency == 1 and self._seconds_a_group is not None:
            share = -(-len(self._waiting) // max(1, len(self._workers)))
            limit = max(1, min(MAX_BATCH, share, int(BATCH_S / self._seconds_a_group)))
        batch: list[_Request] = []
        while len(batch) < limit and (head := self._head()) is not None:
            if head.alone and batch:
                break
            batch.append(self._waiting.popleft())
            if head.alone:
                break
        return batch

    async def _attempt(self, worker: _Worker, batch: list[_Request], slots: int) -> None:
        """One call of a worker, which gets its ``slots`` back afterward."""
        # The last try of a group is for a worker that lives: two may have died together while they were idle.
        is_last = batch[0].retries == 0
        answer = None if is_last else self._asked(worker, batch)
        try:
            async with worker.turn:
                if worker.retired or (is_last and not await self._lives(worker)):
                    self._again(batch)
                else:
                    await self._answer(worker, batch, answer)
        except asyncio.CancelledError:
            self._fail(batch, RewardError(self._closed or "the reward pool is stopped"))
            raise
        except Exception as error:
            self._fail(batch, error)
        finally:
            if not worker.retired:
                self._free.extend([worker] * slots)
            self._send()

    async def _lives(self, worker: _Worker) -> bool:
        try:
            await asyncio.wait_for(worker.actor.ready.remote(), self._settings.timeout_s)
        except (RayError, TimeoutError):
            self._replace(worker)
            return False
        return True

    def _asked(self, worker: _Worker, batch: list[_Request]) -> Any:
        return worker.actor.score.remote([request.group for request in batch], self.progress)

    async def _answer(self, worker: _Worker, batch: list[_Request], answer: Any) -> None:
        """Wait for a call and hand out what it brought; none: it is made here."""
        if answer is None:
            answer = self._asked(worker, batch)
        started = time.perf_counter()
        # The last group of a call may begin as late as that, and has its whole time then.
        limit_s = self._settings.timeout_s + (LONG_CALL_S if len(batch) > 1 else 0.0)
        try:
            with self._spans.during(f"reward worker {worker.number}", span_name([r.group for r in batch])):
                outcomes: list[Scores | RewardFailure] = await asyncio.wait_for(answer, limit_s)
        except RayTaskError:
            if len(batch) == 1:
                raise
            self._again(batch, alone=True)
            return
        except TimeoutError:
            worker.killed = True
            self._replace(worker)
            if len(batch) > 1:
                self._again(batch, alone=True)
                return
            limit = f"no reward after {self._settings.timeout_s:g} s (rewards.timeout_s); the worker was killed"
            outcomes = [RewardFailure(group_id=batch[0].group.group_id, kind="timeout", message=limit)]
        except RayError as error:
            if worker.killed:
                self._again(batch)
                return
            self._replace(worker)
            if len(batch) > 1:
                self._again(batch, alone=True)
                return
            if batch[0].retries > 0:
                batch[0].retries -= 1
                self._again(batch, alone=True)
                return
            message = f"the reward worker died, {1 + DEATH_RETRIES} times: {shortened(error, 1000)}"
            outcomes = [RewardFailure(group_id=batch[0].group.group_id, kind="worker_died", message=message)]
        seconds = (time.perf_counter() - started) / len(outcomes)
        # Slower at once, faster step by step: a call must not become long by surprise.
        before = seconds if self._seconds_a_group is None else self._seconds_a_group
        self._seconds_a_group = max(seconds, 0.5 * (seconds + before))
        for request, outcome in zip(batch, outcomes, strict=False):
            self._tell(request, outcome)
        self._again(batch[len(outcomes) :])

    def _tell(self, request: _Request, outcome: Scores | RewardFailure) -> None:
        if isinstance(outcome, RewardFailure):
            self._count(outcome)
        if not request.outcome.done():
            scored = outcome if isinstance(outcome, RewardFailure) else outcome.of(request.group)
            request.outcome.set_result(scored)

    @staticmethod
    def _fail(batch: list[_Request], error: Exception) -> None:
        for request in batch:
            if not request.outcome.done():
                request.outcome.set_exception(error)

    def _again(self, batch: list[_Request], *, alone: bool = False) -> None:
        """Put groups back to the front, in their order."""
        if self._closed is not None:
            self._fail(batch, RewardError(self._closed))
            return
        for request in reversed(batch):
            request.alone = request.alone or alone
            self._waiting.appendleft(request)

    def _new_worker(self) -> _Worker:
        actor_class = ray.remote(self._worker_class).options(
            num_cpus=self._num_cpus,
            max_restarts=0,
            max_concurrency=self._concurrency,
            # Inside a Tune trial, actors would otherwise look for room in the trial's own placement group.
            scheduling_strategy="DEFAULT",
            runtime_env=worker_env(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false"),
        )
        self._starts += 1
        actor = actor_class.remote(*self._worker_arguments)
        return _Worker(actor, self._starts, asyncio.Semaphore(self._concurrency))

    def _replace(self, worker: _Worker) -> None:
        if worker.retired:
            return
        worker.retired = True
        self._workers.remove(worker)
        self._free = deque(other for other in self._free if other is not worker)
        kill(worker.actor)
        self.workers_replaced += 1
        self._spawn(self._start_replacement())

    async def _start_replacement(self) -> None:
        try:
            self._offer([await self._start_worker()])
        except RewardError as error:
            if self._closed is None:
                logger.warning("%s; %d workers are left", error, len(self._workers))
                if not self._workers:
                    self._close(str(error))

    async def _start_worker(self) -> _Worker:
        """Start a worker, and another one in its place where it dies before it stands.

        Raises:
            RewardError: It cannot start, or the pool was stopped.
        """
        tries = 0
        while True:
            tries += 1
            worker = self._new_worker()
            self._workers.append(worker)
            error: Exception | None = None
            try:
                await asyncio.wait_for(worker.actor.ready.remote(), self._startup_timeout_s)
            except (RayError, TimeoutError) as caught:
                error = caught
            if worker.retired:
                raise RewardError(self._closed or "the reward pool is stopped")
            if error is None:
                return worker
            worker.retired = True
            self._workers.remove(worker)
            kill(worker.actor)
            failure = self._startup_failure(error)
            if tries == START_TRIES or not died_by_itself(error):
                raise RewardError(failure) from error
            logger.warning("%s; another one is started", failure)

    def _offer(self, workers: Sequence[_Worker]) -> None:
        """Take turns, so that the first groups do not all go to the first worker."""
        for _ in range(self._slots):
            self._free.extend(workers)
        self._send()

    async def _shut_down(self, reason: str) -> None:
        self._close(reason)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            _, late = await asyncio.wait(others, timeout=SHUTDOWN_S)
            for task in late:
                task.cancel()

    def _close(self, reason: str) -> None:
        self._closed = reason
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.killed = worker.retired = True
        stop_all(*((f"reward worker {worker.number}", partial(kill, worker.actor)) for worker in workers))
        self._fail(list(self._waiting), RewardError(reason))
        self._waiting.clear()

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = self._loop.create_task(work)
        self._tasks.add(task)  # The loop itself holds tasks weakly only.
        task.add_done_callback(self._tasks.discard)
        return task

    def _count(self, failure: RewardFailure) -> None:
        first = failure.kind not in self.failures
        self.failures[failure.kind] += 1
        # The first of each kind is news; the rest are in the counters.
        level = logging.WARNING if first else logging.DEBUG
        logger.log(level, "group %d has no reward (%s): %s", failure.group_id, failure.kind, failure.message)

    def _startup_failure(self, error: Exception) -> str:
        if isinstance(error, (GetTimeoutError, TimeoutError)):
            return (
                f"a reward worker did not start in {self._startup_timeout_s:g} s: are {self._num_cpus:g} CPUs free for "
                f"each of {self._settings.num_workers} (resources.cpus_per_reward_worker, rewards.num_workers)?"
            )
        return f"a reward worker cannot start: {shortened(error, 1000)}"


def span_name(groups: Sequence[RolloutGroup]) -> str:
    """What the timeline calls the scoring of some groups, at least one."""
    others = f" and {len(groups) - 1} more" if len(groups) > 1 else ""
    return f"group {groups[0].group_id}{others}"


def kill(actor: Any) -> None:
    """End an actor, if its cluster still runs."""
    if ray.is_initialized():  # A cluster that is gone took its actors along, and ray.kill would start a new one.
        ray.kill(actor)


def died_by_itself(error: Exception) -> bool:
    """Whether an actor ended without an error of its own, as with its node: another one may well start."""
    return isinstance(error, RayActorError) and not error.actor_init_failed
