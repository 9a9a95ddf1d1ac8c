from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import pytest

from rlhf_ray.learner.bridge import Bridge, Command, RankFailure
from rlhf_ray.weight_sync.manifest import WeightManifest

Result = TypeVar("Result")

FAILURE = RankFailure(rank=1, message="Traceback: CUDA out of memory")
PATIENCE_S = 5.0


def run(test: Coroutine[Any, Any, Result]) -> Result:
    async def limited() -> Result:
        return await asyncio.wait_for(test, PATIENCE_S)

    return asyncio.run(limited())


def manifest(version: int) -> WeightManifest:
    return WeightManifest(version=version, publication=f"p{version}", buckets=())


async def settle() -> None:
    """Let every task that can go on do so."""
    for _ in range(10):
        await asyncio.sleep(0)


async def serve(bridge: Bridge, rank: int, reply: Callable[[Command], Awaitable[Any]]) -> None:
    """A learner rank: takes commands and answers them until it is cancelled."""
    after = await bridge.register(rank)
    while True:
        command = await bridge.next_command(after, PATIENCE_S)
        assert command is not None
        after = command.sequence
        await bridge.answer(after, rank, await reply(command))


async def start_ranks(bridge: Bridge, *replies: Callable[[Command], Awaitable[Any]]) -> list[asyncio.Task[None]]:
    tasks = [asyncio.create_task(serve(bridge, rank, reply)) for rank, reply in enumerate(replies)]
    assert await bridge.wait_ready(PATIENCE_S) is True
    return tasks


async def echo(command: Command) -> str:
    return command.verb


# Start-up.


def test_ready_when_every_rank_registered() -> None:
    async def test() -> None:
        bridge = Bridge(2)
        waiting = asyncio.create_task(bridge.wait_ready(PATIENCE_S))
        assert await bridge.register(0) == 0
        await settle()
        assert not waiting.done()
        await bridge.register(1)
        assert await waiting is True

    run(test())


def test_not_ready_when_time_is_over() -> None:
    async def test() -> None:
        bridge = Bridge(2)
        await bridge.register(0)
        assert await bridge.wait_ready(0.01) is False
        await bridge.register(1)
        assert await bridge.wait_ready(0.01) is True

    run(test())


def test_a_failure_ends_the_wait_for_the_others() -> None:
    async def test() -> None:
        bridge = Bridge(2)
        waiting = asyncio.create_task(bridge.wait_ready(PATIENCE_S))
        await settle()
        await bridge.fail(FAILURE)
        assert await waiting == FAILURE
        assert await bridge.wait_ready(PATIENCE_S) == FAILURE

    run(test())


def test_a_rank_that_registers_again_is_a_new_attempt_of_the_whole_group() -> None:
    async def test() -> None:
        bridge = Bridge(2)
        await bridge.register(0)
        await bridge.register(1)
        assert await bridge.attempt() == 0
        await bridge.register(1)
        assert await bridge.attempt() == 1
        assert await bridge.wait_ready(0.01) is False, "rank 0 has not come back yet"
        await bridge.register(0)
        assert await bridge.wait_ready(0.01) is True
        assert await bridge.attempt() == 1

    run(test())


def test_a_rank_that_registers_late_listens_only_to_what_comes_after() -> None:
    async def test() -> None:
        bridge = Bridge(1)
        (task,) = await start_ranks(bridge, echo)
        await bridge.execute("update", (None,), PATIENCE_S)
        task.cancel()
        after = await bridge.register(0)
        assert after == 1
        assert await bridge.next_command(after, 0.01) is None

    run(test())


# Commands.


def test_answers_come_in_rank_order_whoever_is_first() -> None:
    async def test() -> None:
        async def late(command: Command) -> str:
            await asyncio.sleep(0.02)
            return "rank 0"

        async def early(command: Command) -> str:
            return "rank 1"

        bridge = Bridge(2)
        await start_ranks(bridge, late, early)
        assert await bridge.execute("update", (None,), PATIENCE_S) == ["rank 0", "rank 1"]

    run(test())


def test_each_rank_gets_its_own_argument() -> None:
    async def test() -> None:
        def of(rank: int) -> Callable[[Command], Awaitable[Any]]:
            async def reply(command: Command) -> Any:
                return command.verb, command.argument(rank)

            return reply

        bridge = Bridge(2)
        await start_ranks(bridge, of(0), of(1))
        assert await bridge.execute("update", ("a", "b"), PATIENCE_S) == [("update", "a"), ("update", "b")]
        assert await bridge.execute("save", ("both",), PATIENCE_S) == [("save", "both"), ("save", "both")]

    run(test())


def test_none_is_an_answer_like_any_other() -> None:
    async def test() -> None:
        async def nothing(command: Command) -> None:
            return None

        bridge = Bridge(2)
        await start_ranks(bridge, nothing, nothing)
        assert await bridge.execute("save", ("folder",), PATIENCE_S) == [None, None]

    run(test())


def test_commands_are_given_one_at_a_time() -> None:
    async def test() -> None:
        seen: list[str] = []
        release = asyncio.Event()

        async def reply(command: Command) -> str:
            seen.append(command.verb)
            await release.wait()
            return command.verb

        bridge = Bridge(1)
        await start_ranks(bridge, reply)
        first = asyncio.create_task(bridge.execute("update", (None,), PATIENCE_S))
        second = asyncio.create_task(bridge.execute("publish", (None,), PATIENCE_S))
        await settle()
        assert seen == ["update"]
        release.set()
        assert (await first, await second) == (["update"], ["publish"])
        assert seen == ["update", "publish"]

    run(test())


def test_time_over_gives_none_and_a_late_answer_is_nobodys() -> None:
    async def test() -> None:
        bridge = Bridge(1)
        await bridge.register(0)
        assert await bridge.execute("update", (None,), 0.01) is None
        late = await bridge.next_command(0, PATIENCE_S)
        assert late is not None
        pending = asyncio.create_task(bridge.execute("save", ("folder",), PATIENCE_S))
        await settle()
        await bridge.answer(late.sequence, 0, "stale")
        await settle()
        assert not pending.done()
        command = await bridge.next_command(late.sequence, PATIENCE_S)
        assert command is not None
        assert command.verb == "save"
        await bridge.answer(command.sequence, 0, "saved")
        assert await pending == ["saved"]

    run(test())


def test_a_failure_ends_the_running_command_and_answers_all_later_ones() -> None:
    async def test() -> None:
        bridge = Bridge(2)
        await bridge.register(0)
        await bridge.register(1)
        pending = asyncio.create_task(bridge.execute("update", (None,), PATIENCE_S))
        await settle()
        await bridge.answer(1, 0, "done")
        await bridge.fail(FAILURE)
        assert await pending == FAILURE
        assert await bridge.execute("publish", (None,), PATIENCE_S) == FAILURE
        assert await bridge.next_command(1, 0.01) is None, "a failed group is given nothing more"

    run(test())


def test_the_first_failure_is_the_one_that_is_told() -> None:
    async def test() -> None:
        bridge = Bridge(2)
        await bridge.fail(FAILURE)
        await bridge.fail(RankFailure(rank=0, message="connection closed by peer"))
        assert await bridge.wait_ready(PATIENCE_S) == FAILURE

    run(test())


def test_long_poll_ends_with_a_command_or_with_its_time() -> None:
    async def test() -> None:
        bridge = Bridge(1)
        assert await bridge.next_command(0, 0.01) is None
        polling = asyncio.create_task(bridge.next_command(0, PATIENCE_S))
        await settle()
        assert not polling.done()
        asking = asyncio.create_task(bridge.execute("stop", (None,), PATIENCE_S))
        command = await polling
        assert command == Command(sequence=1, verb="stop", arguments=(None,))
        assert await bridge.next_command(1, 0.01) is None, "a command is given once"
        await bridge.answer(1, 0, None)
        assert await asking == [None]

    run(test())


# Newest weights.


def test_versions_start_at_zero_and_follow_what_was_published() -> None:
    async def test() -> None:
        bridge = Bridge(1)
        assert await bridge.newest_version() == 0
        await bridge.set_weights(manifest(3), ["ref"])
        assert await bridge.newest_version() == 3
        await bridge.set_version(4)
        assert await bridge.newest_version() == 4

    run(test())


@pytest.mark.parametrize("min_version", [2, 3])
def test_weights_that_are_new_enough_are_given_at_once(min_version: int) -> None:
    async def test() -> None:
        bridge = Bridge(1)
        await bridge.set_weights(manifest(3), ["ref"])
        # Nobody would answer a command.
        assert await bridge.newest_weights(min_version) == (manifest(3), ["ref"])

    run(test())


def test_learners_publish_for_a_replica_that_is_behind() -> None:
    async def test() -> None:
        bridge = Bridge(1)
        verbs: list[str] = []

        async def publish(command: Command) -> None:
            verbs.append(command.verb)
            await bridge.set_weights(manifest(4), ["snapshot"])

        await start_ranks(bridge, publish)
        await bridge.set_weights(manifest(3), ["old"])
        await bridge.set_version(4)
        assert await bridge.newest_weights(4) == (manifest(4), ["snapshot"])
        assert await bridge.newest_weights(4) == (manifest(4), ["snapshot"])
        assert verbs == ["publish"]

    run(test())


def test_a_version_that_does_not_exist_is_an_error() -> None:
    async def test() -> None:
        bridge = Bridge(1)

        async def publish(command: Command) -> None:
            await bridge.set_weights(manifest(4), [])

        await start_ranks(bridge, publish)
        with pytest.raises(RuntimeError, match=r"policy version 9 .* the newest is 4"):
            await bridge.newest_weights(9)

    run(test())


def test_failed_learners_have_no_weights_to_give() -> None:
    async def test() -> None:
        bridge = Bridge(1)
        await bridge.fail(FAILURE)
        with pytest.raises(RuntimeError, match="policy version 1"):
            await bridge.newest_weights(1)

    run(test())


def test_controller_is_none_until_it_announced_itself() -> None:
    async def test() -> None:
        bridge = Bridge(1)
        assert await bridge.controller() is None
        await bridge.set_controller("handle")
        assert await bridge.controller() == "handle"

    run(test())
