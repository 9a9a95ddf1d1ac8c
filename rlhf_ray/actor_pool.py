"""A pool of Ray actors: items in, answers out, whatever becomes of the actors.

::

    submit(item) -> waiting -> a call of one or several items, on the least busy worker -> answer
                       ^                |
                       |                |-- raised, or the worker died or was killed at the time limit
                       '-- isolated <---'

The items of a call that ends badly are each sent again in a call of their own, next to which its worker does nothing
else: what ends badly then has itself to blame, and is the only one that fails. Workers that died are replaced. The
pool knows nothing of what its items mean.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Literal, TypeVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from rlhf_ray.errors import RLHFRayError
from rlhf_ray.span_log import SpanLog
from rlhf_ray.stopping import stop_all
from rlhf_ray.types import TraceSpan
from rlhf_ray.untrusted_text import shortened
from rlhf_ray.worker_env import worker_env

__all__ = ["LONG_CALL_S", "ActorPool", "FailureKind", "WorkFailed", "WorkerSpec"]

_LOG = logging.getLogger(__name__)
_LOOP_LOCK = threading.Lock()

START_TRIES = 3
"""Times a worker is started that dies before it is ready, with its node for example."""
LONG_CALL_S = 0.2
"""A worker that has worked so many seconds on a call of several items may answer with the answers that it has."""

Item = TypeVar("Item")
Answer = TypeVar("Answer")
FailureKind = Literal["raised", "timeout", "worker_died"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """How the workers of a pool are made.

    A worker's class has ``ready()``, which returns once the worker can work, and ``work(items)``, which returns one
    answer per item, or those of the first items only.
    """

    title: str
    """What messages, logs and the timeline call a worker; its number follows."""
    worker_class: type
    arguments: tuple[Any, ...]
    """Of the class."""
    num_workers: int
    error: type[RLHFRayError]
    """What is raised where the pool cannot start or continue."""
    timeout_s: float
    """Longest call, in seconds; then the worker is killed and replaced."""
    timeout_setting: str
    """What sets it, for messages."""
    startup_timeout_s: float
    startup_remedy: str
    """What to look at where a worker does not start in that time."""
    calls_per_worker: int = 1
    """Calls that a worker carries out at once."""
    name: str | None = None
    """First part of the names of the actors; unset: they have none."""
    num_cpus: float = 0.0
    num_gpus: float = 0.0
    """What Ray reserves for a worker."""
    env_vars: Mapping[str, str] = field(default_factory=dict)


class WorkFailed(Exception):
    """An item has no answer, and no other item is to blame. ``__cause__`` is what its call raised.

    Args:
        kind: How its last call ended.
        message: One line.
    """

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(kind, message)
        self.kind: FailureKind = kind
        self.message = message


@dataclass(slots=True, eq=False)
class _Worker:
    """An actor, as the pool sees it."""

    actor: Any
    lane: str
    place: int
    slots_free: int = 0
    """Further calls that it may be given; 0 until it is ready."""
    killed: bool = False
    """The pool killed it: the other calls that it was carrying out are not to blame."""


@dataclass(slots=True, eq=False)
class _Request(Generic[Item, Answer]):
    """An item that a caller waits for."""

    item: Item
    answer: asyncio.Future[Answer]
    isolated: bool = False
    """A call that it was part of ended badly: it gets an idle worker of its own."""


class ActorPool(Generic[Item, Answer]):
    """Ray actors that answer items; one that dies, or works on a call for too long, is replaced.

    All state is kept by one event loop, in a thread that all pools of a process share: :meth:`submit` may be awaited on
    any loop, hundreds of times at once, and time limits hold while those loops are busy.

    Args:
        spec: The workers.
        share_of_call: How much of a call an item takes, where 1 is a full call: ``(item, seconds)``, with the seconds
            that items took lately (infinity: not known yet). Waiting items are divided among the workers, too.
        describe: What the timeline calls an item.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        share_of_call: Callable[[Item, float], float],
        describe: Callable[[Item], str],
    ) -> None:
        self.workers_replaced = 0
        """Workers that died, or were killed at the time limit, since the start."""
        self._spec = spec
        self._share_of_call = share_of_call
        self._describe = describe
        self._workers: list[_Worker] = []
        self._waiting: deque[_Request[Item, Answer]] = deque()
        self._item_s = math.inf
        self._starts = 0
        self._spans = SpanLog()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._launching: Future[None] | None = None
        self._closed: str | None = None

    def launch(self) -> None:
        """Begin to start the workers.

        Raises:
            RLHFRayError: ``spec.error``: the pool was started before.
        """
        if self._launching is not None:
            raise self._spec.error(f"the {self._spec.title} pool was started before: make a new one")
        self._launching = asyncio.run_coroutine_threadsafe(self._launch(), _loop())

    def wait_ready(self) -> None:
        """Wait until all workers are ready.

        Raises:
            RLHFRayError: One cannot start: ``spec.error``, or the library's own error that its ``ready()`` raised. Or
                the pool is stopped.
        """
        assert self._launching is not None, "launch() comes first"
        try:
            self._launching.result()
        except CancelledError as error:  # By stop(), in another thread.
            raise self._spec.error(str(self._closed)) from error

    async def submit(self, item: Item) -> Answer:
        """The answer to an item.

        Raises:
            WorkFailed: It has none.
            RLHFRayError: ``spec.error``: the pool is not started or is stopped, or its last worker could not be
                replaced.
        """
        if self._launching is None:
            raise self._spec.error(f"the {self._spec.title} pool is not started")
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._submit(item), _loop()))

    def stop(self) -> None:
        """End the workers; callers that wait for an answer get ``spec.error``."""
        asyncio.run_coroutine_threadsafe(self._stop(), _loop()).result()

    def take_spans(self) -> list[TraceSpan]:
        """What each worker did since the last call."""
        return self._spans.take()

    async def _launch(self) -> None:
        self._check_open()
        await asyncio.gather(*(self._spawn(self._start(place)) for place in range(self._spec.num_workers)))

    async def _submit(self, item: Item) -> Answer:
        self._check_open()
        request = _Request[Item, Answer](item, asyncio.get_running_loop().create_future())
        if not self._waiting:
            # After all items that come in this pass of the loop, so that they can share calls.
            asyncio.get_running_loop().call_soon(self._dispatch)
        self._waiting.append(request)
        return await request.answer

    async def _stop(self) -> None:
        self._close(f"the {self._spec.title} pool is stopped")
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _check_open(self) -> None:
        if self._closed is not None:
            raise self._spec.error(self._closed)

    def _close(self, reason: str) -> None:
        self._closed = reason
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.killed = True
        stop_all(*((worker.lane, partial(_kill, worker.actor)) for worker in workers))
        waiting = list(self._waiting)
        self._waiting.clear()
        self._fail(waiting, self._spec.error(reason))

    # --- calls ------------------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Give waiting items to workers that have room for a call, the least busy first."""
        while self._waiting:
            head = self._waiting[0]
            if head.answer.done():  # Its caller gave up.
                self._waiting.popleft()
                continue
            slots = self._spec.calls_per_worker if head.isolated else 1
            free = [worker for worker in self._workers if worker.slots_free >= slots]
            if not free:
                return
            worker = max(free, key=lambda worker: worker.slots_free)
            worker.slots_free -= slots
            # A task of the pool: when a caller gives up, the worker is still busy and its time limit must be kept.
            self._spawn(self._call(worker, self._next_batch(), slots))

    def _next_batch(self) -> list[_Request[Item, Answer]]:
        """The items of the next call, oldest first; fewer than wait where there is work for several workers."""
        most = math.ceil(len(self._waiting) / len(self._workers))
        batch: list[_Request[Item, Answer]] = []
        size = 0.0
        while self._waiting and len(batch) < most:
            head = self._waiting[0]
            if not head.answer.done():
                size += self._share_of_call(head.item, self._item_s)
                if batch and (size > 1.0 or head.isolated):
                    break
                batch.append(head)
            self._waiting.popleft()
            if head.isolated and batch:
                break
        return batch

    async def _call(self, worker: _Worker, batch: list[_Request[Item, Answer]], slots: int) -> None:
        """One call of a worker, which gets its slots back afterward."""
        spec, lane = self._spec, worker.lane
        others = f" and {len(batch) - 1} more" if len(batch) > 1 else ""
        # The last item of a call may begin as late as that, and has its whole time then.
        limit_s = spec.timeout_s + (LONG_CALL_S if others else 0.0)
        began = False
        try:
            if batch[0].isolated:
                # Its last try is for a worker that lives: several may have died together while they were idle.
                await asyncio.wait_for(worker.actor.ready.remote(), spec.timeout_s)
            began, started = True, time.perf_counter()
            with self._spans.during(lane, self._describe(batch[0].item) + others):
                work = worker.actor.work.remote([request.item for request in batch])
                answers: Sequence[Answer] = await asyncio.wait_for(work, limit_s)
            self._answered(batch, answers, time.perf_counter() - started)
        except RayTaskError as error:
            self._ended_badly(batch, "raised", f"{lane} raised {shortened(error, 1000)}", error)
        except (RayError, TimeoutError) as error:
            blameless, late = worker.killed or not began, isinstance(error, TimeoutError)
            worker.killed = worker.killed or late
            self._replace(worker)
            if blameless:
                self._requeue(batch)
            elif late:
                message = f"no answer after {spec.timeout_s:g} s ({spec.timeout_setting}); {lane} was killed"
                self._ended_badly(batch, "timeout", message, error)
            else:
                message = f"{lane} died at the second try: {shortened(error, 1000)}"
                self._ended_badly(batch, "worker_died", message, error)
        except asyncio.CancelledError:  # By stop().
            self._requeue(batch)
            raise
        except Exception as error:  # An item that cannot be pickled, for example.
            self._fail(batch, error)
        finally:
            worker.slots_free += slots
            self._dispatch()

    def _answered(self, batch: list[_Request[Item, Answer]], answers: Sequence[Answer], seconds: float) -> None:
        item_s = seconds / len(answers)
        # Slower at once, faster step by step: a call must not become long by surprise.
        known = item_s if self._item_s == math.inf else self._item_s
        self._item_s = max(item_s, 0.5 * (item_s + known))
        for request, answer in zip(batch, answers, strict=False):
            if not request.answer.done():
                request.answer.set_result(answer)
        self._requeue(batch[len(answers) :])

    def _ended_badly(
        self, batch: list[_Request[Item, Answer]], kind: FailureKind, message: str, cause: Exception
    ) -> None:
        """Isolate the items of a call; one that was isolated, or was the only one that hung, has failed."""
        if batch[0].isolated or (kind == "timeout" and len(batch) == 1):
            failure = WorkFailed(kind, message)
            failure.__cause__ = cause
            self._fail(batch, failure)
        else:
            for request in batch:
                request.isolated = True
            self._requeue(batch)

    def _requeue(self, batch: Sequence[_Request[Item, Answer]]) -> None:
        """Put items back to the front, in their order."""
        if self._closed is not None:
            self._fail(batch, self._spec.error(self._closed))
        else:
            self._waiting.extendleft(reversed(batch))

    @staticmethod
    def _fail(batch: Sequence[_Request[Item, Answer]], error: Exception) -> None:
        for request in batch:
            if not request.answer.done():
                request.answer.set_exception(error)

    # --- workers ----------------------------------------------------------------------------------------------------

    async def _start(self, place: int) -> None:
        """Start a worker, and another one in its place where it dies before it is ready.

        Raises:
            RLHFRayError: It cannot start, or the pool was closed.
        """
        for tries_left in reversed(range(START_TRIES)):
            self._check_open()
            worker = self._new_worker(place)
            self._workers.append(worker)
            try:
                await asyncio.wait_for(worker.actor.ready.remote(), self._spec.startup_timeout_s)
            except (RayError, TimeoutError) as error:
                self._check_open()
                self._workers.remove(worker)
                _kill(worker.actor)
                failure = self._startup_failure(worker, error)
                if tries_left == 0 or not _died_by_itself(error):
                    raise failure from error
                _LOG.warning("%s; another one is started", failure)
            else:
                worker.slots_free = self._spec.calls_per_worker
                self._dispatch()
                return

    def _new_worker(self, place: int) -> _Worker:
        spec = self._spec
        self._starts += 1
        actor_class = ray.remote(spec.worker_class).options(
            name=None if spec.name is None else f"{spec.name}-{self._starts}",
            num_cpus=spec.num_cpus,
            num_gpus=spec.num_gpus,
            max_restarts=0,
            max_concurrency=spec.calls_per_worker,
            # Inside a Tune trial, actors would otherwise look for room in the trial's own placement group.
            scheduling_strategy="DEFAULT",
            runtime_env=worker_env(**spec.env_vars),
        )
        return _Worker(actor_class.remote(*spec.arguments), f"{spec.title} {place + 1}", place)

    def _replace(self, worker: _Worker) -> None:
        if worker in self._workers:
            self._workers.remove(worker)
            _kill(worker.actor)
            self.workers_replaced += 1
            self._spawn(self._start_replacement(worker.place))

    async def _start_replacement(self, place: int) -> None:
        try:
            await self._start(place)
        except Exception as error:  # Callers must not wait for a worker that does not come.
            if self._closed is None:
                _LOG.warning("%s; %d are left", error, len(self._workers))
                if not self._workers:
                    self._close(str(error))

    def _startup_failure(self, worker: _Worker, error: Exception) -> RLHFRayError:
        cause = getattr(error, "cause", None)  # What ready() raised.
        if isinstance(cause, RLHFRayError):
            return cause
        if isinstance(error, TimeoutError):
            remedy = self._spec.startup_remedy
            return self._spec.error(f"{worker.lane} did not start in {self._spec.startup_timeout_s:g} s{remedy}")
        return self._spec.error(f"{worker.lane} cannot start: {shortened(error, 1000)}")

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # The loop itself holds tasks weakly only.
        task.add_done_callback(self._tasks.discard)
        return task


def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of all pools of this process; its thread ends with the process."""
    with _LOOP_LOCK:
        return _started_loop()


@functools.cache
def _started_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="actor-pools", daemon=True).start()
    return loop


def _kill(actor: Any) -> None:
    """End an actor, if its cluster still runs."""
    if ray.is_initialized():  # A cluster that is gone took its actors along, and ray.kill would start a new one.
        ray.kill(actor)


def _died_by_itself(error: Exception) -> bool:
    """Whether an actor ended without an error of its own, as with its node: another one may well start."""
    return isinstance(error, RayActorError) and not error.actor_init_failed
