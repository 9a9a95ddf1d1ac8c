"""The pool over actors that live in this process: what shares a call, what is sent again, and what fails."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayTaskError

from rlhf_ray import actor_pool
from rlhf_ray.actor_pool import ActorPool, WorkerSpec, WorkFailed
from rlhf_ray.errors import ConfigError, RewardError


class Method:
    """A method of an actor, which is called in the pool's loop."""

    def __init__(self, actor: Actor, name: str) -> None:
        self._actor, self._name = actor, name

    def remote(self, *arguments: Any) -> asyncio.Future[Any]:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._actor.running.append(answer)
        if self._actor.dead:
            answer.set_exception(RayActorError())
        else:
            getattr(self._actor.worker, self._name)(*arguments, answer)
        return answer


class Actor:
    """What ``ray.remote`` would make of a worker's class."""

    made: list[Actor]

    def __init__(self, worker: Any) -> None:
        self.worker, self.dead, self.running = worker, False, []
        self.ready, self.work = Method(self, "ready"), Method(self, "work")

    def die(self) -> None:
        self.dead = True
        for answer in self.running:
            if not answer.done():
                answer.set_exception(RayActorError())


class Worker:
    """Does what its items say: a number is its answer, ``wait`` comes when it is told to, and so on."""

    starts: list[Any]
    """What becomes of each worker: ready (None), dead, or an error; ready where there is none left."""

    def __init__(self) -> None:
        self.calls: list[list[Any]] = []
        self._start = Worker.starts.pop(0) if Worker.starts else None
        self._is_ready = False

    def ready(self, answer: asyncio.Future[Any]) -> None:
        if self._start == "never":
            return
        if self._start == "dead":
            answer.set_exception(RayActorError())
        elif isinstance(self._start, Exception):
            answer.set_exception(RayTaskError("ready", str(self._start), self._start))
        else:
            answer.set_result(None)

    def work(self, items: list[Any], answer: asyncio.Future[Any]) -> None:
        self.calls.append(items)
        loop = asyncio.get_running_loop()
        if "hang" in items:
            return
        if "die" in items:
            actor = next(actor for actor in Actor.made if actor.worker is self)
            loop.call_later(0.01, actor.die)
        elif "raise" in items:
            answer.set_exception(RayTaskError("work", "traceback", ValueError("bad item")))
        elif "wait" in items:
            loop.call_later(0.1, lambda: answer.done() or answer.set_result(items))
        else:
            most = 2 if "two" in items else len(items)
            loop.call_soon(answer.set_result, [f"answer {item}" for item in items[:most]])


@pytest.fixture(autouse=True)
def actors(monkeypatch: pytest.MonkeyPatch) -> list[Actor]:
    """All that were made, oldest first."""
    Actor.made, Worker.starts = [], []

    class Remote:
        def __init__(self, worker_class: type) -> None:
            self._class = worker_class

        def options(self, **_: Any) -> Remote:
            return self

        def remote(self) -> Actor:
            Actor.made.append(Actor(self._class()))
            return Actor.made[-1]

    monkeypatch.setattr(actor_pool.ray, "remote", Remote)
    monkeypatch.setattr(actor_pool.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(actor_pool.ray, "kill", Actor.die)
    monkeypatch.setattr(actor_pool, "worker_env", lambda **_: {})
    return Actor.made


@pytest.fixture
def start() -> Iterator[Callable[..., ActorPool[Any, Any]]]:
    made: list[ActorPool[Any, Any]] = []

    def start(*, share: float = 0.0, ready: bool = True, **options: Any) -> ActorPool[Any, Any]:
        defaults: dict[str, Any] = {"num_workers": 1, "timeout_s": 0.3, "startup_timeout_s": 0.2}
        spec = WorkerSpec(
            title="worker",
            worker_class=Worker,
            arguments=(),
            error=RewardError,
            timeout_setting="the.timeout_s",
            startup_remedy=" (is there room?)",
            **defaults | options,
        )
        pool: ActorPool[Any, Any] = ActorPool(spec, share_of_call=lambda item, seconds: share, describe=str)
        made.append(pool)
        pool.launch()
        if ready:
            pool.wait_ready()
        return pool

    yield start
    for pool in made:
        pool.stop()


def ask(pool: ActorPool[Any, Any], *items: Any) -> list[Any]:
    async def together() -> list[Any]:
        return await asyncio.gather(*(pool.submit(item) for item in items), return_exceptions=True)

    # On the pool's own loop, so that all come in one pass of it.
    return asyncio.run_coroutine_threadsafe(together(), actor_pool._loop()).result(10)


def test_items_share_calls_as_their_shares_and_the_workers_allow(start: Any, actors: list[Actor]) -> None:
    assert ask(start(share=0.5), *range(6)) == [f"answer {item}" for item in range(6)]
    assert [len(call) for call in actors[0].worker.calls] == [2, 2, 2]
    ask(start(num_workers=2), *range(6))
    assert [len(actor.worker.calls[0]) for actor in actors[1:]] == [3, 2]
    ask(start(share=7.0), *range(3))
    assert actors[3].worker.calls == [[0], [1], [2]]


def test_items_that_a_call_left_out_are_sent_again_in_their_order(start: Any, actors: list[Actor]) -> None:
    assert ask(start(), "two", 1, 2, 3) == ["answer two", "answer 1", "answer 2", "answer 3"]
    assert actors[0].worker.calls == [["two", 1, 2, 3], [2, 3]]


@pytest.mark.parametrize(
    ("item", "kind", "message", "replaced"),
    [
        ("raise", "raised", "worker 1 raised", 0),
        ("hang", "timeout", "no answer after 0.3 s (the.timeout_s); worker 1 was killed", 2),
        ("die", "worker_died", "worker 1 died at the second try", 2),
    ],
)
def test_of_a_call_that_ends_badly_only_the_item_to_blame_fails(
    item: str, kind: str, message: str, replaced: int, start: Any, actors: list[Actor]
) -> None:
    pool = start()
    first, failure, last = ask(pool, 1, item, 3)
    assert (first, last) == ("answer 1", "answer 3")
    assert isinstance(failure, WorkFailed)
    assert failure.kind == kind
    assert message in failure.message
    assert pool.workers_replaced == replaced
    assert [call for actor in actors for call in actor.worker.calls] == [[1, item, 3], [1], [item], [3]]
    if kind == "raised":
        assert isinstance(failure.__cause__, RayTaskError)


def test_an_item_that_hangs_alone_is_not_sent_again(start: Any, actors: list[Actor]) -> None:
    pool = start()
    (failure,) = ask(pool, "hang")
    assert isinstance(failure, WorkFailed)
    assert [call for actor in actors for call in actor.worker.calls] == [["hang"]]


def test_nothing_runs_next_to_an_isolated_item(start: Any, actors: list[Actor]) -> None:
    pool = start(calls_per_worker=3, share=1.0, timeout_s=5.0)
    answers = ask(pool, "wait", "raise", "wait", 4)
    assert isinstance(answers[1], WorkFailed)
    assert answers[3] == "answer 4"
    assert actors[0].worker.calls == [["wait"], ["raise"], ["wait"], ["raise"], [4]]


def test_calls_next_to_one_that_hangs_are_repeated_without_blame(start: Any, actors: list[Actor]) -> None:
    pool = start(calls_per_worker=2, share=1.0, timeout_s=0.15)

    async def staggered() -> list[Any]:
        hanging = asyncio.create_task(pool.submit("hang"))
        await asyncio.sleep(0.1)
        return await asyncio.gather(hanging, pool.submit("wait"), return_exceptions=True)

    hanging, waiting = asyncio.run(staggered())
    assert isinstance(hanging, WorkFailed)
    assert waiting == "wait"
    assert pool.workers_replaced == 1


def test_workers_that_died_while_idle_cost_no_item(start: Any, actors: list[Actor]) -> None:
    pool = start(num_workers=3)
    for actor in actors[:3]:
        actor.dead = True
    assert ask(pool, 1) == ["answer 1"]


def test_an_item_whose_caller_gave_up_is_left_out(start: Any, actors: list[Actor]) -> None:
    pool = start(share=1.0)

    async def impatient() -> Any:
        tasks = [asyncio.create_task(pool.submit(item)) for item in ("wait", 2)]
        await asyncio.sleep(0.02)
        for task in tasks:
            task.cancel()
        return await pool.submit(3)

    assert asyncio.run(impatient()) == "answer 3"
    assert actors[0].worker.calls == [["wait"], [3]]


def test_a_worker_that_dies_before_it_is_ready_is_started_again_twice(start: Any, actors: list[Actor]) -> None:
    Worker.starts = ["dead", "dead"]
    assert ask(start(), 1) == ["answer 1"]
    assert len(actors) == 3
    Worker.starts = ["dead", "dead", "dead"]
    with pytest.raises(RewardError, match="worker 1 cannot start"):
        start()


def test_what_a_worker_says_of_its_start_is_raised(start: Any) -> None:
    Worker.starts = [ConfigError("path", "x", "no such model")]
    with pytest.raises(ConfigError, match="no such model"):
        start()
    Worker.starts = ["never"]
    with pytest.raises(RewardError, match=r"worker 1 did not start in 0\.2 s \(is there room\?\)"):
        start()


def test_a_last_worker_that_cannot_be_replaced_closes_the_pool(start: Any, actors: list[Actor]) -> None:
    pool = start()
    Worker.starts = [ValueError("the disk is full")]
    errors = ask(pool, "die", 2)
    assert [type(error) for error in errors] == [RewardError] * 2
    assert "the disk is full" in str(errors[0])
    assert [type(error) for error in ask(pool, 3)] == [RewardError]


def test_a_pool_starts_once_and_is_needed_to_be_started(start: Any) -> None:
    pool = start()
    with pytest.raises(RewardError, match="started before"):
        pool.launch()
    assert ask(pool, 1) == ["answer 1"]
    new: ActorPool[Any, Any] = ActorPool(pool._spec, share_of_call=lambda *_: 1.0, describe=str)
    with pytest.raises(RewardError, match="not started"):
        asyncio.run(new.submit(1))
    new.stop()
    new.launch()
    with pytest.raises(RewardError, match="the worker pool is stopped"):
        new.wait_ready()


def test_stop_ends_starts_calls_and_waits_from_any_thread(start: Any, actors: list[Actor]) -> None:
    Worker.starts = ["never"]
    starting = start(ready=False, startup_timeout_s=60.0)
    threading.Timer(0.1, starting.stop).start()
    with pytest.raises(RewardError, match="the worker pool is stopped"):
        starting.wait_ready()

    pool = start(share=1.0, timeout_s=60.0)
    stopping = [threading.Timer(0.1, pool.stop) for _ in range(2)]
    for timer in stopping:
        timer.start()
    began = time.perf_counter()
    errors = ask(pool, "hang", 2)
    assert [str(error) for error in errors] == ["the worker pool is stopped"] * 2
    assert time.perf_counter() - began < 5.0
    for timer in stopping:
        timer.join(5.0)
        assert not timer.is_alive()
    assert all(actor.dead for actor in actors)
    assert pool.workers_replaced == 0


def test_spans_name_workers_and_items(start: Any) -> None:
    pool = start()
    ask(pool, 1, 2, 3)
    assert [(span.lane, span.name) for span in pool.take_spans()] == [("worker 1", "1 and 2 more")]
    assert pool.take_spans() == []
