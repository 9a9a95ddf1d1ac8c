"""Environment workers, seen from the driver: episodes that go on whatever becomes of the worker that plays them.

::

    Played.step(sampled) -> posted with others -> worker -> answer
                                 ^                  |
                                 |                  |-- no answer in step_timeout_s: the worker is killed, the episode
                                 |                  |   that hung has failed
                                 |                  '-- it died, or answers nothing at all: episodes that were stepping
                                 |                      are suspects
                                 '---- replayed on the replacement from what was sampled; suspects one at a time, so
                                       that the one to blame is found: it alone fails

Use it on one event loop.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from rlhf_ray.environments.episode import EpisodeFailed, Reply, Sampled, Start
from rlhf_ray.environments.worker import Call, EnvironmentWorker, WorkerSettings
from rlhf_ray.errors import RLHFRayError, RolloutError
from rlhf_ray.stopping import stop_all
from rlhf_ray.untrusted_text import shortened
from rlhf_ray.worker_env import worker_env

__all__ = ["EnvironmentPool", "Played", "PoolSettings"]

_LOG = logging.getLogger(__name__)
_CLOSE_TIMEOUT_S = 5.0
_PING_TIMEOUT_S = 2.0
_START_TRIES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    """The workers of a pool."""

    worker: WorkerSettings
    deterministic: frozenset[str]
    """Environments whose episodes can be played again."""
    num_workers: int
    num_cpus: float
    step_timeout_s: float
    startup_timeout_s: float
    runtime_env: dict[str, Any] = field(default_factory=dict)


class _WorkerLostError(Exception):
    """A worker ended before it answered; ``blamed`` is the episode that hung."""

    def __init__(self, blamed: Played | None) -> None:
        super().__init__()
        self.blamed = blamed


class _Worker:
    """An actor, as the pool sees it; its replacement is another one of these."""

    def __init__(self, pool: EnvironmentPool, place: int, suspects: set[Played]) -> None:
        self.place = place
        self.episodes: set[Played] = set()
        self.suspects = suspects
        """Episodes that were stepping when the worker before this one died by itself."""
        self.alone = asyncio.Lock()
        """Of the suspect that is played."""
        self.is_open = asyncio.Event()
        """Whether all suspects have been played again, so that others may."""
        self._pool = pool
        self._waiting: dict[int, tuple[Played, asyncio.Future[Reply]]] = {}
        self._posting: list[Call] = []
        self.replacement: asyncio.Task[_Worker] | None = None
        self.next_suspects: set[Played] = set()
        """Those of the replacement."""
        self.actor = pool.take_actor()
        self._polling: asyncio.Task[None] | None = None

    async def ask(self, episode: Played, call: Call) -> Reply:
        """Post a call and wait for its answer.

        Raises:
            EpisodeFailed: It is the answer.
            _WorkerLostError: The worker ended before.
        """
        if self.replacement is not None:
            raise _WorkerLostError(None)
        loop = asyncio.get_running_loop()
        if self._polling is None:
            self._polling = loop.create_task(self._poll())
        answer: asyncio.Future[Reply] = loop.create_future()
        self._waiting[call.number] = episode, answer
        if not self._posting:
            loop.call_soon(self._post)  # After all calls that come up in this pass of the loop.
        self._posting.append(call)
        limit_s = self._pool.settings.step_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                return await answer
        except TimeoutError:
            if not await self._is_to_blame(episode):
                raise _WorkerLostError(None) from None
            self.lost(episode)
            message = f"no answer after {limit_s:g} s (environment.step_timeout_s); environment worker {self.place + 1}"
            raise EpisodeFailed("timeout", f"{episode.start.environment}: {message} was killed") from None
        finally:
            self._waiting.pop(call.number, None)

    async def _is_to_blame(self, episode: Played) -> bool:
        """Whether an episode that has not answered in time hangs, and not the whole worker for another's sake."""
        if episode in self.suspects:  # It plays alone.
            return True
        try:
            async with asyncio.timeout(_PING_TIMEOUT_S):
                await self.actor.ready.remote()
            return True
        except (TimeoutError, RayError):
            # A step that blocks the event loop, or a process that is stopped: as if it had died.
            if self.replacement is None:
                _LOG.warning("environment worker %d does not answer any more", self.place + 1)
            self.lost(None)
            return False

    def forget(self, call: Call) -> None:
        """Post a call whose answer is of no interest."""
        if self.replacement is None:
            if not self._posting:
                asyncio.get_running_loop().call_soon(self._post)
            self._posting.append(call)

    def lost(self, blamed: Played | None) -> None:
        """Start another worker in place of this one, which has died or is killed because an episode hangs."""
        if self.replacement is not None:
            return
        waiting, self._waiting = self._waiting, {}
        if blamed is None:  # A suspect that was stepping alone is found out.
            self.next_suspects = {episode for episode, _ in waiting.values()} - self.suspects
        self.replacement = self._pool.replace(self)
        self.is_open.set()  # Those that wait for this find that it is lost.
        for _, answer in waiting.values():
            if not answer.done():
                answer.set_exception(_WorkerLostError(blamed))
                answer.exception()  # Read, also where its caller is gone.

    async def ready(self) -> None:
        """Wait until the actor is."""
        await asyncio.wait_for(self.actor.ready.remote(), self._pool.settings.startup_timeout_s)
        self.acquit(None)

    def acquit(self, episode: Played | None) -> None:
        """An episode is no suspect any more; when none is left, the others may be played."""
        if episode is not None:
            self.suspects.discard(episode)
        if not self.suspects:
            self.is_open.set()

    def _post(self) -> None:
        calls, self._posting = self._posting, []
        if self.replacement is None:
            self.actor.post.remote(calls)

    async def _poll(self) -> None:
        try:
            while True:
                for number, outcome in await self.actor.answers.remote():
                    _, answer = self._waiting.get(number, (None, None))
                    if answer is None or answer.done():
                        continue
                    if isinstance(outcome, EpisodeFailed):
                        answer.set_exception(outcome)
                    else:
                        answer.set_result(outcome)
        except RayError as error:
            if not self._pool.closed:
                if self.replacement is None:
                    _LOG.warning("environment worker %d died: %s", self.place + 1, shortened(error))
                self.lost(None)


class Played:
    """One episode, wherever it is played."""

    def __init__(self, pool: EnvironmentPool, start: Start, worker: _Worker) -> None:
        self.start = start
        self._pool = pool
        self._id = pool.next_number()
        self._worker = worker
        self._past: list[tuple[Call, Reply]] = []
        self._recovery = asyncio.Lock()
        worker.episodes.add(self)

    async def begin(self) -> Reply:
        """As :meth:`Episode.begin`.

        Raises:
            EpisodeFailed: The environment raised, hung, died with its worker, or does not play the same episode again.
        """
        return await self._do("begin", self.start)

    async def step(self, sampled: Sampled) -> Reply:
        """As :meth:`Episode.step`."""
        return await self._do("step", sampled)

    @property
    def worker(self) -> str:
        """What the timeline calls the worker that plays it."""
        return f"environment worker {self._worker.place + 1}"

    async def cut(self, reason: str) -> Reply:
        """As :meth:`Episode.cut`."""
        return await self._do("cut", reason)

    def close(self) -> None:
        """End it, at whatever point."""
        worker = self._worker
        worker.episodes.discard(self)
        worker.acquit(self)
        worker.next_suspects.discard(self)
        if worker.replacement is not None and worker.replacement.done() and not worker.replacement.exception():
            worker.replacement.result().acquit(self)
        worker.forget(self._call("close", None))

    def _call(self, method: str, argument: Start | Sampled | str | None) -> Call:
        return Call(number=self._pool.next_number(), episode=self._id, method=method, argument=argument)

    async def _do(self, method: str, argument: Start | Sampled | str) -> Reply:
        call = self._call(method, argument)
        while True:
            worker = self._worker
            await worker.is_open.wait()
            try:
                reply = await worker.ask(self, call)
            except _WorkerLostError:
                reply_or_none = await self._recover(worker, call)
                if reply_or_none is None:
                    continue
                reply = reply_or_none
            self._past.append((call, reply))
            return reply

    async def _recover(self, lost: _Worker, call: Call) -> Reply | None:
        """Play again what there was; of a suspect also the call, alone, whose reply is returned."""
        assert lost.replacement is not None
        async with self._recovery:  # An agent's parallel calls are all lost at once.
            if self._worker is not lost:
                return None
            if self.start.environment not in self._pool.settings.deterministic and self._past:
                message = "its worker died, and it is not to be played again (environment.replay, deterministic)"
                raise EpisodeFailed("worker_died", f"{self.start.environment}: {message}")
            worker = await asyncio.shield(lost.replacement)
            self._worker = worker
            worker.episodes.add(self)
            if self not in worker.suspects:
                await worker.is_open.wait()
                with suppress(_WorkerLostError):  # The next call finds that out.
                    await self._replay(worker)
                return None
            try:
                async with worker.alone:
                    if worker.replacement is not None:  # Another suspect ended it.
                        return None
                    await self._replay(worker)
                    return await worker.ask(self, call)
            except _WorkerLostError:
                message = "its worker died in this step, twice"
                raise EpisodeFailed("worker_died", f"{self.start.environment}: {message}") from None
            finally:
                worker.acquit(self)

    async def _replay(self, worker: _Worker) -> None:
        """Play what there was.

        Raises:
            EpisodeFailed: The environment answers otherwise.
            _WorkerLostError: This worker ended too.
        """
        for call, recorded in self._past:
            reply = await worker.ask(self, self._call(call.method, call.argument))
            if not _same(reply, recorded):
                message = (
                    "its worker died, and played again it answers otherwise: make what it draws follow from the seed, "
                    "or set deterministic = False"
                )
                raise EpisodeFailed("not_seeded", f"{self.start.environment}: {message}")


class EnvironmentPool:
    """The environment workers of a run.

    Args:
        settings: How they are made.
    """

    def __init__(self, settings: PoolSettings) -> None:
        self.settings = settings
        self.closed = False
        self.workers_replaced = 0
        """Workers that died, or were killed because an episode hung, since the start."""
        self._numbers = itertools.count()
        self._actors: list[Any] = []
        """All that live."""
        self._unused: list[Any] = []
        """Those that wait for the first episode."""
        self._workers: list[_Worker] = []
        self._replacing: set[asyncio.Task[_Worker]] = set()

    def start(self) -> None:
        """Start all workers and wait until they are ready.

        Raises:
            RolloutError: One does not start.
            ConfigError: An environment cannot be used in a worker.
        """
        self._unused = [self._new_actor() for _ in range(self.settings.num_workers)]
        limit_s = self.settings.startup_timeout_s
        try:
            ray.get([actor.ready.remote() for actor in self._unused], timeout=limit_s)
        except ray.exceptions.GetTimeoutError:
            raise RolloutError(
                f"environment workers did not start in environment.startup_timeout_s = {limit_s:g} s: are "
                f"{self.settings.num_cpus:g} CPUs free for each of {self.settings.num_workers} "
                "(resources.cpus_per_environment_worker, environment.num_workers)?"
            ) from None
        except RayError as error:
            if isinstance(cause := getattr(error, "cause", None), RLHFRayError):
                raise cause from error
            raise RolloutError(f"environment workers cannot start: {shortened(error, 1000)}") from error

    def stop(self) -> None:
        """End the workers, which have a moment to close what is open."""
        self.closed = True
        if ray.is_initialized():
            kills = [("environment worker", functools.partial(ray.kill, actor)) for actor in self._actors]
            stop_all(("environments", self._close_episodes), *kills)

    def _close_episodes(self) -> None:
        closing = [worker.actor.stop.remote() for worker in self._workers]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_TIMEOUT_S)

    def play(self, start: Start) -> Played:
        """A new episode, on the worker that has the fewest."""
        if not self._workers:  # Only now is there an event loop.
            self._workers = [_Worker(self, place, set()) for place in range(self.settings.num_workers)]
            for worker in self._workers:
                worker.acquit(None)
        worker = min(self._workers, key=lambda worker: (len(worker.episodes), worker.place))
        return Played(self, start, worker)

    def take_actor(self) -> Any:
        """An actor that waits for its first episode, or a new one."""
        return self._unused.pop(0) if self._unused else self._new_actor()

    def replace(self, worker: _Worker) -> asyncio.Task[_Worker]:
        """Start another worker in the place of one that is lost; ends what is left of that."""
        self.workers_replaced += 1
        if ray.is_initialized():
            ray.kill(worker.actor)
        self._actors.remove(worker.actor)
        task = asyncio.get_running_loop().create_task(self._replaced(worker.place, worker.next_suspects))
        self._replacing.add(task)
        task.add_done_callback(self._replacing.discard)
        return task

    def next_number(self) -> int:
        """A number that no call and no episode has."""
        return next(self._numbers)

    def _new_actor(self) -> Any:
        settings = self.settings
        actor_class = ray.remote(EnvironmentWorker).options(
            num_cpus=settings.num_cpus,
            num_gpus=0,
            max_restarts=0,
            max_concurrency=16,
            # Inside a Tune trial, actors would otherwise look for room in the trial's own placement group.
            scheduling_strategy="DEFAULT",
            runtime_env=_with_user_env(worker_env(OMP_NUM_THREADS="1"), settings.runtime_env),
        )
        actor = actor_class.remote(settings.worker)
        self._actors.append(actor)
        return actor

    async def _replaced(self, place: int, suspects: set[Played]) -> _Worker:
        for tries_left in reversed(range(_START_TRIES)):
            worker = _Worker(self, place, suspects)
            try:
                await worker.ready()
            except (RayActorError, TimeoutError) as error:
                if tries_left == 0 or self.closed:
                    reason = shortened(error, 1000) or f"not ready in {self.settings.startup_timeout_s:g} s"
                    raise RolloutError(f"environment worker {place + 1} could not be replaced: {reason}") from error
            else:
                self._workers[place] = worker
                return worker
        raise AssertionError("unreachable")


def _same(reply: Reply, recorded: Reply) -> bool:
    """Whether an environment answered what it answered before."""

    def key(one: Reply) -> Sequence[Any]:
        requests = [(request.sequence, request.token_ids.tolist()) for request in one.requests]
        return requests, one.reward, one.finish_reason, one.final_reward

    return list(key(reply)) == list(key(recorded))


def _with_user_env(own: dict[str, Any], of_user: dict[str, Any]) -> dict[str, Any]:
    """A runtime environment of the user's, with our variables where it does not set them."""
    variables = {**own.get("env_vars", {}), **of_user.get("env_vars", {})}
    return {**of_user, "env_vars": variables}
