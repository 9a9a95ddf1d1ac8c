"""The pool over workers in this process: they die and hang as Ray's actors do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import pytest
from environments.games import Echo, Guess, Unseeded
from environments.test_play import TOKENIZER, sampled_of, start_of
from ray.exceptions import ActorDiedError

from rlhf_ray.environments import play as play_module
from rlhf_ray.environments import pool as pool_module
from rlhf_ray.environments.episode import EpisodeFailed, Reply, Sampled, Start
from rlhf_ray.environments.pool import EnvironmentPool, PoolSettings
from rlhf_ray.environments.registry import NamedEnvironment
from rlhf_ray.environments.worker import Call, EnvironmentWorker, WorkerSettings
from rlhf_ray.errors import RolloutError
from rlhf_ray.pickling import serialize


class Died(BaseException):
    """Raised in place of the end of the process."""


class Dying(Echo):
    """As :class:`Echo`, but its death is that of the fake actor."""

    def step(self, action: Any) -> Any:
        """Obey."""
        if "die" in action.text:
            raise Died
        return super().step(action)


class Method:
    """A method of an actor handle."""

    def __init__(self, function: Callable[..., Awaitable[Any]]) -> None:
        self._function = function

    def remote(self, *arguments: Any) -> asyncio.Future[Any]:
        return asyncio.ensure_future(self._function(*arguments))


class Actor:
    """An :class:`EnvironmentWorker` in this process, which may be killed."""

    made = 0

    def __init__(self, settings: WorkerSettings) -> None:
        Actor.made += 1
        self._worker = EnvironmentWorker(settings)
        self._dead = asyncio.Event()
        self._frozen = False
        self.posts: list[Sequence[Call]] = []
        self.ready, self.post, self.answers = map(Method, (self._ready, self._post, self._answers))

    def die(self) -> None:
        self._dead.set()

    def freeze(self) -> None:
        """Answer nothing any more, as a process that is stopped."""
        self._frozen = True
        self.ready = Method(self._never)

    async def _never(self) -> None:
        await self._dead.wait()
        raise ActorDiedError

    async def _ready(self) -> None:
        await self._worker.ready()

    async def _post(self, calls: Sequence[Call]) -> None:
        self.posts.append(calls)
        if self._dead.is_set():
            raise ActorDiedError
        sampled = [call.argument for call in calls if isinstance(call.argument, Sampled)]
        if any(b"freeze" in one.token_ids.astype(np.uint8).tobytes() for one in sampled):
            self.freeze()
        if not self._frozen:
            await self._worker.post(calls)

    async def _answers(self) -> Any:
        answers = asyncio.ensure_future(self._worker.answers())
        dead = asyncio.ensure_future(self._dead.wait())
        await asyncio.wait([answers, dead], return_when=asyncio.FIRST_COMPLETED)
        if self._dead.is_set():
            raise ActorDiedError
        return answers.result()


class Pool(EnvironmentPool):
    """With fake actors."""

    def __init__(self, *environments: NamedEnvironment, step_timeout_s: float = 20.0, num_workers: int = 1) -> None:
        worker = WorkerSettings(
            environments=tuple(one.serialized() for one in environments),
            tokenizer=serialize(TOKENIZER, defined_by=TOKENIZER),
            trust_remote_code=False,
            chat_template=None,
        )
        super().__init__(
            PoolSettings(
                worker=worker,
                deterministic=frozenset(one.name for one in environments if one.deterministic),
                num_workers=num_workers,
                num_cpus=0.0,
                step_timeout_s=step_timeout_s,
                startup_timeout_s=20.0,
            )
        )
        self.actors: list[Actor] = []

    def _new_actor(self) -> Any:
        actor = Actor(self.settings.worker)
        ready = asyncio.ensure_future(actor._ready())
        actor.ready = Method(lambda: _after(ready))
        self.actors.append(actor)
        self._actors.append(actor)
        return actor

    async def first(self) -> None:
        """Wait for the first workers, as start() does with Ray."""
        self.loop = asyncio.get_running_loop()
        self._unused = [self._new_actor() for _ in range(self.settings.num_workers)]
        for actor in self._unused:
            await actor.ready.remote()


async def _after(ready: asyncio.Future[Any]) -> None:
    await ready


def named(made: Any, name: str = "game") -> NamedEnvironment:
    return NamedEnvironment(name=name, make=made, defined_by=made)


@pytest.fixture(autouse=True)
def deaths(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that ends its process ends its fake actor, before anything is answered."""
    caught = play_module._caught

    def or_die(function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        answer = caught(function, arguments)
        if isinstance(answer, play_module._Raised) and isinstance(answer.error, Died):
            (pool,) = POOLS
            for actor in pool.actors:
                if any(
                    getattr(episode, "_environment", None) is function.__self__  # type: ignore[attr-defined]
                    for episode in actor._worker._episodes.values()
                ):
                    pool.loop.call_soon_threadsafe(actor.die)
        return answer

    monkeypatch.setattr(play_module, "_caught", or_die)


POOLS: list[Pool] = []


def text_of(reply: Reply) -> str:
    return "" if not reply.requests else str(TOKENIZER.decode(reply.requests[0].token_ids.tolist()))


async def play(pool: Pool, *texts: str, start: Start | None = None) -> list[str]:
    """The observations of an episode."""
    played = pool.play(start or start_of())
    try:
        replies = [await played.begin()]
        replies += [await played.step(sampled_of(text, number)) for number, text in enumerate(texts)]
        return [text_of(reply) for reply in replies]
    finally:
        played.close()


def run(pool_of: Callable[[], Pool], script: Callable[[Pool], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        pool = pool_of()
        POOLS[:] = [pool]
        await pool.first()
        try:
            return await asyncio.wait_for(script(pool), 60)
        finally:
            pool.closed = True
            for actor in pool.actors:
                actor.die()

    return asyncio.run(main())


def test_many_episodes_share_a_worker_and_keep_apart() -> None:
    async def script(pool: Pool) -> None:
        answers = await asyncio.gather(*(play(pool, f"a{i}", f"b{i}") for i in range(40)))
        assert answers == [["a number", f"<a{i}1>", f"<b{i}2>"] for i in range(40)]
        assert max(len(calls) for calls in pool.actors[0].posts) >= 40, "calls of one pass go together"

    run(lambda: Pool(named(Dying)), script)


def test_episodes_are_spread_over_workers() -> None:
    async def script(pool: Pool) -> None:
        played = [pool.play(start_of()) for _ in range(6)]
        assert sorted(one.worker for one in played) == sorted(
            f"environment worker {1 + number % 3}" for number in range(6)
        )
        played[1].close()
        assert pool.play(start_of()).worker == played[1].worker, "where one has ended there is room"

    run(lambda: Pool(named(Dying), num_workers=3), script)


def test_what_an_environment_raises_is_the_failure_of_its_episode_alone() -> None:
    async def script(pool: Pool) -> None:
        bad, good = await asyncio.gather(play(pool, "raise"), play(pool, "a", "b"), return_exceptions=True)
        assert isinstance(bad, EpisodeFailed)
        assert bad.kind == "raised"
        assert good == ["a number", "<a1>", "<b2>"]
        assert pool.workers_replaced == 0

    run(lambda: Pool(named(Dying)), script)


def test_other_episodes_of_a_worker_that_dies_are_played_again() -> None:
    async def script(pool: Pool) -> None:
        waiting = asyncio.Event()

        async def between(text: str) -> list[str]:
            played = pool.play(start_of())
            texts = [text_of(await played.begin()), text_of(await played.step(sampled_of("x")))]
            await waiting.wait()
            texts.append(text_of(await played.step(sampled_of(text, 1))))
            played.close()
            return texts

        others = [asyncio.create_task(between(f"y{i}")) for i in range(5)]
        bad = asyncio.create_task(play(pool, "a", "die"))
        with pytest.raises(EpisodeFailed) as failure:
            await bad
        waiting.set()
        assert await asyncio.gather(*others) == [["a number", "<x1>", f"<y{i}2>"] for i in range(5)]
        assert failure.value.kind == "worker_died"
        assert "twice" in failure.value.message
        assert pool.workers_replaced == 2

    run(lambda: Pool(named(Dying)), script)


def test_of_those_that_were_stepping_only_the_one_to_blame_fails() -> None:
    async def script(pool: Pool) -> None:
        texts = [["a", "b", "c"], ["a", "die"], ["d", "e", "f"], ["die"], ["g", "h", "i"]]
        answers = await asyncio.gather(*(play(pool, *each) for each in texts), return_exceptions=True)
        failed = [isinstance(answer, EpisodeFailed) for answer in answers]
        assert failed == [False, True, False, True, False]
        assert answers[2] == ["a number", "<d1>", "<e2>", "<f3>"]

    run(lambda: Pool(named(Dying)), script)


def test_an_episode_that_hangs_costs_its_group_and_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[Any] = []
    monkeypatch.setattr(pool_module.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(pool_module.ray, "kill", lambda actor: (killed.append(actor), actor.die()))

    async def script(pool: Pool) -> None:
        started = asyncio.get_running_loop().time()
        bad, *good = await asyncio.gather(
            play(pool, "hang"), *(play(pool, "a", "b", "c") for _ in range(3)), return_exceptions=True
        )
        assert isinstance(bad, EpisodeFailed)
        assert bad.kind == "timeout"
        assert "environment.step_timeout_s" in bad.message
        assert good == [["a number", "<a1>", "<b2>", "<c3>"]] * 3
        assert asyncio.get_running_loop().time() - started < 10
        assert killed == [pool.actors[0]]

    run(lambda: Pool(named(lambda: Dying(hang_s=1.0)), step_timeout_s=0.5), script)


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Actors that were killed."""
    killed: list[Any] = []
    monkeypatch.setattr(pool_module.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(pool_module.ray, "kill", lambda actor: (killed.append(actor), actor.die()))
    monkeypatch.setattr(pool_module, "_PING_TIMEOUT_S", 0.1)
    return killed


def test_a_worker_that_is_stopped_as_a_whole_costs_no_group(kills: list[Any]) -> None:
    async def script(pool: Pool) -> None:
        played = [pool.play(start_of()) for _ in range(5)]
        for one in played:
            await one.begin()
        pool.actors[0].freeze()
        replies = await asyncio.gather(*(one.step(sampled_of("x")) for one in played))
        assert [text_of(reply) for reply in replies] == ["<x1>"] * 5
        assert kills == [pool.actors[0]]

    run(lambda: Pool(named(Dying), step_timeout_s=0.3), script)


def test_a_step_that_blocks_its_worker_costs_its_group_alone(kills: list[Any]) -> None:
    async def script(pool: Pool) -> None:
        texts = [["a", "b", "c"], ["a", "freeze"], ["d", "e", "f"], ["g", "h", "i"]]
        answers = await asyncio.gather(*(play(pool, *each) for each in texts), return_exceptions=True)
        assert [isinstance(answer, EpisodeFailed) for answer in answers] == [False, True, False, False]
        assert answers[1].kind == "timeout"
        assert answers[3] == ["a number", "<g1>", "<h2>", "<i3>"]
        assert len(kills) == 2, "the worker, and the one on which the episode to blame was played alone"

    run(lambda: Pool(named(Dying), step_timeout_s=0.3), script)


def test_episodes_that_answer_otherwise_when_they_are_played_again_fail() -> None:
    async def script(pool: Pool) -> None:
        played = pool.play(Start(prompt=start_of().prompt, seed=1, environment="odd"))
        await played.begin()
        await played.step(sampled_of("a"))
        pool.actors[0].die()
        with pytest.raises(EpisodeFailed, match="make what it draws follow from the seed") as failure:
            await played.step(sampled_of("b", 1))
        assert failure.value.kind == "not_seeded"

    run(lambda: Pool(named(Dying), named(Unseeded, "odd")), script)


def test_what_is_not_deterministic_is_not_played_again() -> None:
    class Declared(Unseeded):
        deterministic = False

    async def script(pool: Pool) -> None:
        played = pool.play(start_of())
        await played.begin()
        pool.actors[0].die()
        with pytest.raises(EpisodeFailed, match="not to be played again") as failure:
            await played.step(sampled_of("a"))
        assert failure.value.kind == "worker_died"

    run(lambda: Pool(named(Declared)), script)


def test_a_game_that_follows_from_its_seed_survives_every_death() -> None:
    async def script(pool: Pool) -> None:
        undisturbed = await play(pool, "9", "8", "2")
        played = pool.play(start_of())
        disturbed = [text_of(await played.begin())]
        for number, text in enumerate(("9", "8", "2")):
            pool.actors[-1].die()
            disturbed.append(text_of(await played.step(sampled_of(text, number))))
        assert disturbed == undisturbed
        assert pool.workers_replaced == 3

    run(lambda: Pool(named(Guess)), script)


def test_a_suspect_that_is_given_up_does_not_block_the_others() -> None:
    async def script(pool: Pool) -> None:
        other = pool.play(start_of())
        await other.begin()
        suspect = pool.play(start_of())
        await suspect.begin()
        step = asyncio.create_task(suspect.step(sampled_of("die")))
        while pool.workers_replaced == 0:
            await asyncio.sleep(0.001)
        step.cancel()
        await asyncio.gather(step, return_exceptions=True)
        suspect.close()
        assert text_of(await other.step(sampled_of("x"))) == "<x1>"

    run(lambda: Pool(named(Dying)), script)


def test_a_worker_that_cannot_be_replaced_ends_the_run() -> None:
    async def script(pool: Pool) -> None:
        played = pool.play(start_of())
        await played.begin()

        async def never() -> None:
            raise ActorDiedError

        def stillborn() -> Any:
            actor = Actor(pool.settings.worker)
            actor.ready = Method(never)
            pool._actors.append(actor)
            return actor

        pool._new_actor = stillborn  # type: ignore[method-assign]
        pool.actors[0].die()
        with pytest.raises(RolloutError, match="environment worker 1 could not be replaced"):
            await played.step(sampled_of("a"))

    run(lambda: Pool(named(Dying)), script)
