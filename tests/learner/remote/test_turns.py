"""Whose turn it is, by the real bridge: engines, ranks and the driver are played here, and die at random."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest
from some_commands import command as some_command
from some_commands import request, update

from rlhf_ray.errors import ConfigError
from rlhf_ray.learner.remote import turns as module
from rlhf_ray.learner.remote.bridge import Bridge
from rlhf_ray.learner.remote.commands import GroupLost, RecallCommand, UpdateCommand
from rlhf_ray.learner.remote.turns import Place, check_pairing

POLL_S = 0.05
PATIENCE_S = 20.0
DEATHS = 12
PLACE = ("node", "0")


class Actor:
    alive = True


async def _is_alive(actor: Actor) -> bool:
    return actor.alive


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_answers", _is_alive)
    monkeypatch.setattr(module, "_CHECK_S", 0.01)
    monkeypatch.setattr(module, "_GRACE_S", 0.5)


class Machine:
    """GPUs with a replica and a rank each, the bridge, and a driver; each that wakes or comes looks around first."""

    def __init__(self, seed: int, count: int, *, sends: bool = False) -> None:
        self._random = random.Random(seed)
        self._sends = sends
        self._staged: dict[str, int] = {}
        self._count = count
        self.awake: set[str] = set()
        self.resident: set[tuple[str, int]] = set()
        self.served: dict[str, int] = {}
        self.violations: list[str] = []
        self._deaths = 0
        self._tasks: dict[str, tuple[asyncio.Task[Any], Callable[[], None]]] = {}
        self._bridge, self._bridge_ended = Bridge(count, count), asyncio.Event()
        self._group = ""
        self._abandoned: list[asyncio.Task[Any]] = []

    # What Ray does: calls are repeated at a bridge that was started again.

    async def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        while True:
            work = asyncio.ensure_future(getattr(self._bridge, method)(*arguments, **options))
            gone = asyncio.ensure_future(self._bridge_ended.wait())
            try:
                done, _ = await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                gone.cancel()
                if not work.done():
                    work.cancel()
            if work in done:
                return work.result()

    async def pause(self) -> None:
        await asyncio.sleep(self._random.choice((0.0, 0.0, 0.001, 0.004)))

    def look(self) -> None:
        if self.awake and self.resident:
            self.violations.append(
                f"engines {sorted(self.awake)} are awake while there are ranks {sorted(self.resident)}"
            )

    # An engine in its replica.

    def start_engine(self, number: int) -> None:
        self._deaths += 1
        name, actor = f"engine {number} ({self._deaths})", Actor()

        def end() -> None:
            actor.alive = False
            self.awake.discard(name)
            self.served.pop(name, None)
            self._later(lambda: self.start_engine(number))

        self._start(f"engine {number}", self._engine(name, actor), end)

    async def _engine(self, name: str, actor: Actor) -> None:
        async def wait(*, awake: bool) -> None:
            about = {"actor": actor, "place": PLACE, "timeout_s": POLL_S}
            while await self.call("follow_turn", name, awake=awake, **about) is None:
                pass

        async def catch_up() -> None:
            version = await self.call("newest_version")
            if version:
                await self.call("newest_weights", version)
            self.served[name] = version

        attending = asyncio.ensure_future(self.call("attend_turns", name, actor, PLACE))
        await wait(awake=False)
        self.awake.add(name)
        self.look()
        await asyncio.sleep(self._random.choice((0.0, 0.03)))  # It is built, and says nothing.
        catching_up = asyncio.ensure_future(catch_up())
        try:
            while True:
                await wait(awake=True)
                await self.pause()
                self.awake.discard(name)
                await wait(awake=False)
                self.awake.add(name)
                self.look()
                await self.pause()
                newest = await self.call("current_weights")
                if newest is not None:
                    self.served[name] = newest[0].version
        finally:
            catching_up.cancel()
            attending.cancel()

    # The ranks: one that dies takes its group along.

    def start_group(self) -> None:
        self._deaths += 1
        group = f"group {self._deaths}"

        def end() -> None:
            self.resident.clear()
            self._later(self.start_group)

        async def all_ranks() -> None:
            ranks = [asyncio.ensure_future(self._rank(rank, group)) for rank in range(self._count)]
            try:
                await asyncio.gather(*ranks)
            finally:
                for rank in ranks:
                    rank.cancel()

        self._start("learners", all_ranks(), end)

    async def _rank(self, rank: int, group: str) -> None:
        me, version = (group, rank), 0
        while not await self.call("wait_turn", rank, group, PLACE, POLL_S):
            pass
        self.resident.add(me)
        self.look()
        await self.pause()
        while True:
            given = await self.call("next_command", rank, group, version, POLL_S, me in self.resident)
            if given is None:
                continue
            command = given.command(rank)
            await self.pause()
            if command.name == "offload":
                self.resident.discard(me)
                continue
            if command.name == "send":
                if self.resident:
                    self.violations.append(f"ranks {sorted(self.resident)} take memory that engines need to wake")
                sent = self._staged.get(group, -1)
                while rank == 0 and len(self.awake) < self._count:  # Each replica takes them when it is awake.
                    await asyncio.sleep(0.001)
                if rank == 0 and sent == version:
                    self.served.update(dict.fromkeys(self.awake, sent))
                    await self.call("set_version", sent)
                await self.call("answer", given.request_id, rank, sent)
                continue
            self.resident.add(me)
            self.look()
            await self.pause()
            version = command.version if isinstance(command, UpdateCommand | RecallCommand) else version
            if command.name == "stage":
                self._staged[group] = version
            if command.name == "publish" and rank == 0:
                self._deaths += 1
                await self.call("set_weights", _manifest(version, f"publication {self._deaths}"), [])
            await self.call("answer", given.request_id, rank, version)

    # The driver.

    async def iterate(self, iterations: int) -> None:
        for version in range(1, iterations + 1):
            async with asyncio.timeout(PATIENCE_S):
                await self.interrupted_turn(version)
                await self.turn(version, "update", "stage" if self._sends else "publish")
                while self._sends and not await self.send(version):
                    await self.turn(version, "stage")
                # Collect, with what every engine serves then.
                while len(self.awake) < self._count or set(self.served.values()) != {version}:
                    if await self.call("current_weights") is None:  # They went with the learners that had them.
                        await self.turn(version, "publish")
                    await asyncio.sleep(0.001)

    async def interrupted_turn(self, version: int) -> None:
        """Ctrl-C while the learners are at work, or are about to be: their answer is not waited for."""
        self._deaths += 1
        token = f"turn {self._deaths}"
        held = asyncio.ensure_future(self.call("hold_turn", token))
        asked = request(update(version), group=self._group)
        self._abandoned.append(asyncio.ensure_future(self.call("execute", asked, PATIENCE_S)))
        await asyncio.sleep(self._random.uniform(0.0, 0.02))
        await self.give_back(token, held)

    async def send(self, version: int) -> bool:
        """In the engines' turn; false where the learners died meanwhile."""
        answer = await self.call("execute", request("send", group=self._group), PATIENCE_S)
        if isinstance(answer, GroupLost):
            return False
        assert answer == [version] * self._count
        return True

    async def give_back(self, token: str, held: asyncio.Future[Any]) -> None:
        while not held.done():  # As the learner group does.
            await self.call("give_turn_back", token)
            await asyncio.wait([held], timeout=0.01)

    async def turn(self, version: int, *names: str) -> None:
        self._deaths += 1
        token = f"turn {self._deaths}"
        held = asyncio.ensure_future(self.call("hold_turn", token))
        for name in names:
            while True:
                asked = request(some_command(name, version), group=self._group)
                answer = await self.call("execute", asked, PATIENCE_S) if self._group else GroupLost()
                if not isinstance(answer, GroupLost):
                    assert answer == [version] * self._count
                    break
                self._group = await self.call("wait_ready", PATIENCE_S, after=self._group or None)
                recall = RecallCommand(version=version - (name == "update"))
                await self.call("execute", request(recall, group=self._group), PATIENCE_S)
        await self.give_back(token, held)
        assert not await self.call("wait_away", PATIENCE_S)

    # Deaths.

    async def hurt(self, kinds: tuple[str, ...]) -> None:
        for _ in range(DEATHS):
            await asyncio.sleep(self._random.uniform(0.0, 0.05))
            kind = self._random.choice(kinds)
            if kind == "bridge":
                self._bridge_ended.set()
                self._bridge, self._bridge_ended = Bridge(self._count, self._count), asyncio.Event()
            else:
                name = "learners" if kind == "learners" else f"engine {self._random.randrange(self._count)}"
                await self._end(name)

    async def run(self, iterations: int, kinds: tuple[str, ...]) -> None:
        for number in range(self._count):
            self.start_engine(number)
        self.start_group()
        hurting = asyncio.ensure_future(self.hurt(kinds)) if kinds else None
        try:
            await self.iterate(iterations)
        finally:
            if hurting is not None:
                hurting.cancel()
            for task in (*(task for task, _ in self._tasks.values()), *self._abandoned):
                task.cancel()

    def _start(self, name: str, work: Coroutine[Any, Any, None], end: Callable[[], None]) -> None:
        self._tasks[name] = asyncio.ensure_future(work), end

    async def _end(self, name: str) -> None:
        task, end = self._tasks.get(name, (None, None))
        if task is None or end is None or task.cancelled():
            return
        assert not task.done(), task.exception()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        end()

    def _later(self, start: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_later(self._random.uniform(0.0, 0.02), start)


def _manifest(version: int, publication: str) -> Any:
    from rlhf_ray.weight_sync.manifest import WeightManifest

    return WeightManifest(version=version, publication=publication, buckets=())


@pytest.mark.parametrize("sends", [False, True])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kinds", [(), ("engine",), ("learners",), ("bridge",), ("engine", "learners", "bridge")])
def test_no_rank_is_on_its_gpu_while_an_engine_is_awake(
    count: int, kinds: tuple[str, ...], sends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_GRACE_S", 0.02)
    for seed in range(3):
        machine = Machine(seed, count, sends=sends)
        asyncio.run(machine.run(10, kinds))
        assert machine.violations == []


def test_a_bridge_that_was_started_again_waits_for_engines_that_it_has_not_heard_of() -> None:
    async def run() -> None:
        bridge = Bridge(1, 2)
        held = asyncio.ensure_future(bridge.hold_turn("turn"))
        assert not await bridge.wait_turn(0, "group", PLACE, POLL_S)
        for name in ("a", "b"):
            told = bridge.follow_turn(name, awake=False, actor=Actor(), place=PLACE, timeout_s=0.001)
            assert await told is None
        assert await bridge.wait_turn(0, "group", PLACE, POLL_S)
        await bridge.give_turn_back("turn")
        await held

    asyncio.run(run())


@pytest.mark.parametrize("dies", [False, True])
def test_a_bridge_that_was_started_again_knows_of_an_engine_that_is_being_built(
    dies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long that takes; and of its death, without a wait."""
    monkeypatch.setattr(module, "_GRACE_S", PATIENCE_S if dies else 0.0)

    async def run() -> None:
        bridge, actor = Bridge(1, 1), Actor()
        attending = asyncio.ensure_future(bridge.attend_turns("engine", actor, PLACE))
        held = asyncio.ensure_future(bridge.hold_turn("turn"))
        assert not await bridge.wait_turn(0, "group", PLACE, 5 * POLL_S)
        if dies:
            actor.alive = False
        else:
            assert await bridge.follow_turn("engine", awake=True, actor=actor, place=PLACE, timeout_s=1.0) is False
            assert not await bridge.wait_turn(0, "group", PLACE, POLL_S)
            asleep = bridge.follow_turn("engine", awake=False, actor=actor, place=PLACE, timeout_s=0.001)
            assert await asleep is None
        assert await bridge.wait_turn(0, "group", PLACE, PATIENCE_S / 2)
        await asyncio.sleep(0.01)
        assert attending.done() == dies
        attending.cancel()
        await bridge.give_turn_back("turn")
        await held

    asyncio.run(run())


def test_a_bridge_that_was_started_again_learns_where_ranks_are() -> None:
    async def run() -> None:
        bridge = Bridge(1, 1)
        await bridge.next_command(0, "group", 0, 0.001, True, PLACE)
        assert (await bridge.places())[1] == {0: PLACE}

    asyncio.run(run())


def test_a_bridge_gives_up_on_engines_that_never_come() -> None:
    async def run() -> None:
        bridge = Bridge(1, 1)
        held = asyncio.ensure_future(bridge.hold_turn("turn"))
        assert await bridge.wait_turn(0, "group", PLACE, PATIENCE_S)
        held.cancel()

    asyncio.run(run())


def test_a_turn_that_was_given_back_is_not_held_by_a_call_that_is_repeated() -> None:
    async def run() -> None:
        bridge = Bridge(1, 1)
        await bridge.give_turn_back("turn")
        await asyncio.wait_for(bridge.hold_turn("turn"), PATIENCE_S)
        assert bridge._turns is not None
        assert not bridge._turns.is_wanted

    asyncio.run(run())


def test_learners_that_were_started_again_are_found_in_their_turn_alone() -> None:
    """Engines are not disturbed at their work for learners that are not needed yet."""

    async def run() -> list[str | None]:
        bridge = Bridge(1, 1)
        await bridge.wait_turn(0, "group", PLACE, 0.001)
        found = [await bridge.group()]
        held = asyncio.ensure_future(bridge.hold_turn("turn"))
        await asyncio.sleep(0)
        found.append(await bridge.group())
        held.cancel()
        return found

    assert asyncio.run(run()) == [None, "group"]


def test_the_learners_turn_is_over_when_every_rank_is_away() -> None:
    async def run() -> list[bool]:
        bridge, seen = Bridge(2, 1), []
        await bridge.follow_turn("engine", awake=False, actor=Actor(), place=PLACE, timeout_s=0.001)
        held = asyncio.ensure_future(bridge.hold_turn("turn"))
        for rank in (0, 1):
            assert await bridge.wait_turn(rank, "group", PLACE, PATIENCE_S)
        await bridge.give_turn_back("turn")
        await held
        assert await bridge.wait_away(0.01)
        over = asyncio.ensure_future(bridge.wait_away(PATIENCE_S))
        for rank in (0, 1):
            told = await bridge.next_command(rank, "group", 0, PATIENCE_S, True)
            assert told is not None
            assert told.command().name == "offload"
            assert await bridge.next_command(rank, "group", 0, 0.001, False) is None
            seen.append(over.done())
        return seen

    assert asyncio.run(run()) == [False, True]


def test_weights_are_sent_while_engines_are_awake_whoever_wants_the_turn_meanwhile() -> None:
    async def run() -> list[str]:
        bridge, seen = Bridge(1, 1), []
        told = await bridge.follow_turn("engine", awake=False, actor=Actor(), place=PLACE, timeout_s=0.001)
        assert told is None
        held = asyncio.ensure_future(bridge.hold_turn("update"))
        assert await bridge.wait_turn(0, "group", PLACE, PATIENCE_S)
        assert await bridge.next_command(0, "group", 1, 0.001, True) is None
        await bridge.give_turn_back("update")
        await held
        sending = asyncio.ensure_future(bridge.execute(request("send", group="group"), PATIENCE_S))
        await asyncio.sleep(0.01)
        # One that is there must leave first: the engine could not wake.
        for resident in (True, False):
            given = await bridge.next_command(0, "group", 1, PATIENCE_S, resident)
            assert given is not None
            seen.append(given.command().name)
        assert await bridge.follow_turn("engine", awake=False, actor=Actor(), place=PLACE, timeout_s=PATIENCE_S)
        # A replica that starts asks for weights, and the engine is needed awake all the same.
        wanted = asyncio.ensure_future(bridge.hold_turn("publish"))
        await asyncio.sleep(0.05)
        about = {"actor": Actor(), "place": PLACE}
        assert await bridge.follow_turn("engine", awake=True, timeout_s=0.05, **about) is None
        await bridge.answer(given.request_id, 0, "sent")
        seen += await sending
        assert await bridge.follow_turn("engine", awake=True, timeout_s=PATIENCE_S, **about) is False
        wanted.cancel()
        return seen

    assert asyncio.run(run()) == ["offload", "send", "sent"]


GPUS: list[Place] = [("one", "0"), ("one", "1"), ("two", "0")]


@pytest.mark.parametrize(
    ("replicas", "ranks", "are_pairs"),
    [
        ([0, 1, 2], [2, 0, 1], True),
        ([0, 0, 1, 1], [2, 2, 2, 2], False),
        ([0, 1], [0, 2], False),
        ([0, 0], [0, 0], False),
        ([0], [0, 1], False),
    ],
)
def test_each_gpu_has_a_replica_and_a_learner(replicas: list[int], ranks: list[int], are_pairs: bool) -> None:
    placed = (
        {str(index): GPUS[gpu] for index, gpu in enumerate(replicas)},
        {rank: GPUS[gpu] for rank, gpu in enumerate(ranks)},
    )
    if are_pairs:
        check_pairing(*placed)
    else:
        with pytest.raises(ConfigError, match="not placed in pairs: replicas are on GPU 0 of node one") as caught:
            check_pairing(*placed)
        assert caught.value.field == "resources.colocate"
