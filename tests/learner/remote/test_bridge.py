from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

import pytest
from some_commands import command, request, update

from rlhf_ray.checkpoints.folder import StoredFile
from rlhf_ray.learner.remote.bridge import Bridge
from rlhf_ray.learner.remote.commands import Command, GroupLost, RankFailure, Request
from rlhf_ray.weight_sync.manifest import ReplicaFailure, WeightManifest

Result = TypeVar("Result")

FAILURE = RankFailure(rank=1, message="Traceback: CUDA out of memory")
FILE = StoredFile(size_bytes=1, crc32=2)
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


GROUP = "first"


def order(*commands: Command | str, group: str = GROUP) -> Request:
    return request(*commands, group=group)


async def serve(
    bridge: Bridge, rank: int, reply: Callable[[Request], Awaitable[Any]], group: str, version: int
) -> None:
    """A learner rank: takes commands and answers them until it is cancelled."""
    while True:
        command = await bridge.next_command(rank, group, version, PATIENCE_S)
        assert command is not None
        await bridge.answer(command.request_id, rank, await reply(command))


async def start_ranks(
    bridge: Bridge, *replies: Callable[[Request], Awaitable[Any]], group: str = GROUP, version: int = 0
) -> list[asyncio.Task[None]]:
    tasks = [asyncio.create_task(serve(bridge, rank, reply, group, version)) for rank, reply in enumerate(replies)]
    await settle()
    assert await bridge.wait_ready(PATIENCE_S) == group
    return tasks


async def listen(
    bridge: Bridge, *ranks: int, group: str = GROUP, version: int = 0
) -> list[asyncio.Task[Request | None]]:
    """Ranks that ask for one command."""
    polls = [asyncio.create_task(bridge.next_command(rank, group, version, PATIENCE_S)) for rank in ranks]
    await settle()
    return polls


async def echo(request: Request) -> str:
    return request.command().name


# Start-up.


def test_ready_when_every_rank_listens() -> None:
    async def test() -> None:
        bridge = Bridge(2)
        waiting = asyncio.create_task(bridge.wait_ready(PATIENCE_S))
        await listen(bridge, 0)
        assert not waiting.done()
        await listen(bridge, 1)
        assert await waiting == GROUP

    run(test())


def test_not_ready_when_time_is_over() -> None:
    async def test() -> None:
        bridge = Bridge(2)
        await listen(bridge, 0)
        assert await bridge.wait_ready(0.01) is None
        await listen(bridge, 1)
        assert await bridge.wait_ready(0.01) == GROUP

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


# A worker group that is started again.


def test_the_group_that_listens_is_told() -> None:
    async def test() -> None:
        bridge = Bridge(2)
        assert await bridge.group() is None
        await listen(bridge, 0, 1)
        assert await bridge.group() == GROUP
        await listen(bridge, 1, group="second")
        assert await bridge.group() == "second"

    run(test())


def test_the_next_group_is_ready_when_all_of_it_listens() -> None:
    async def test() -> None:
        bridge = Bridge(2)
        await listen(bridge, 0, 1)
        waiting = asyncio.create_task(bridge.wait_ready(PATIENCE_S, after=GROUP))
        await listen(bridge, 1, group="second")
        assert not waiting.done()
        await listen(bridge, 0, group="second")
        assert await waiting == "second"

    run(test())


def test_what_the_lost_group_was_asked_is_not_answered_by_the_next_one() -> None:
    async def test() -> None:
        bridge = Bridge(2)
        await listen(bridge, 0, 1)
        pending = asyncio.create_task(bridge.execute(order("update"), PATIENCE_S))
        await settle()
        (poll,) = await listen(bridge, 0, group="second")
        assert await pending == GroupLost()
        assert not poll.done(), "the update was not for this group"

        late = asyncio.create_task(bridge.execute(order("update"), PATIENCE_S))
        await listen(bridge, 1, group="second")
        assert await late == GroupLost()

    run(test())


def test_a_failure_ends_with_its_group() -> None:
    async def test() -> None:
        bridge = Bridge(1)
        await listen(bridge, 0)
        await bridge.fail(FAILURE)
        assert await bridge.execute(order("update"), PATIENCE_S) == FAILURE
        await start_ranks(bridge, echo, group="second")
        assert await bridge.execute(order("update", group="second"), PATIENCE_S) == ["update"]

    run(test())


def test_weights_of_a_lost_group_are_published_again_once_the_next_one_has_that_version() -> None:
    async def test() -> None:
        async def publish(request: Request) -> None:
            await bridge.set_weights(manifest(3), ["new"])

        bridge = Bridge(1)
        await listen(bridge, 0)
        await bridge.set_weights(manifest(3), ["of a dead process"])
        (rank,) = await start_ranks(bridge, publish, group="second")
        asking = asyncio.create_task(bridge.newest_weights(3))
        await settle()
        assert not asking.done(), "this group still has the first weights"
        rank.cancel()
        await start_ranks(bridge, publish, group="second", version=3)
        assert await asking == (manifest(3), ["new"])

    run(test())


def test_files_of_a_checkpoint_end_with_the_group_that_writes_them() -> None:
    async def test() -> None:
        bridge = Bridge(2)
        await start_ranks(bridge, echo, echo)
        save = order("save")
        await bridge.execute(save, PATIENCE_S)
        waiting = asyncio.create_task(bridge.wait_saved(save.request_id, GROUP, PATIENCE_S))
        saved = asyncio.create_task(bridge.saved(save.request_id, 0, {}))
        await listen(bridge, 0, group="second")
        assert await waiting == GroupLost()
        await saved

    run(test())


# A bridge that is started again: calls are repeated at a new one.


def test_a_repeated_command_collects_the_answers_once_more() -> None:
    async def test() -> None:
        command, asked = order("update"), []

        async def rank(number: int) -> None:
            last = None
            while True:
                given = await bridge.next_command(number, GROUP, 4, PATIENCE_S)
                assert given is not None
                if given.request_id != last:
                    asked.append(number)
                last = given.request_id
                await bridge.answer(last, number, f"figures {number}")

        # Rank 0 has carried it out for the bridge that died, rank 1 has not.
        bridge = Bridge(2)
        execution = asyncio.create_task(bridge.execute(command, PATIENCE_S))
        await settle()
        assert not execution.done()
        ranks = [asyncio.create_task(rank(0)), asyncio.create_task(rank(1))]
        assert await execution == ["figures 0", "figures 1"]
        assert sorted(asked) == [0, 1]
        for each in ranks:
            each.cancel()

    run(test())


def test_a_rank_is_given_again_what_it_has_not_answered_here() -> None:
    async def test() -> None:
        bridge = Bridge(2)
        await listen(bridge, 0, 1)
        pending = asyncio.create_task(bridge.execute(order("update"), PATIENCE_S))
        await settle()
        first = await bridge.next_command(0, GROUP, 0, PATIENCE_S)
        again = await bridge.next_command(0, GROUP, 0, PATIENCE_S)
        assert first is again is not None
        await bridge.answer(first.request_id, 0, None)
        assert await bridge.next_command(0, GROUP, 0, 0.01) is None
        pending.cancel()

    run(test())


@pytest.mark.parametrize("first", ["rank", "files", "wait"])
def test_files_that_the_dead_bridge_knew_of_are_told_again(first: str) -> None:
    """In whichever order the calls come that it had not answered."""

    async def test() -> None:
        bridge, calls = Bridge(1), []
        save = order("save")
        steps = {
            "files": lambda: bridge.saved(save.request_id, 0, {"a": FILE}),
            "wait": lambda: bridge.wait_saved(save.request_id, GROUP, PATIENCE_S),
            "rank": lambda: bridge.next_command(0, GROUP, 0, 0.01),
        }
        for name in (first, *(steps.keys() - {first})):
            calls.append((name, asyncio.create_task(steps[name]())))
            await settle()
        told = dict(calls)
        assert await told["wait"] == {"a": FILE}
        await settle()
        assert not told["files"].done()
        # The next checkpoint ends the call.
        await start_ranks(bridge, echo)
        await bridge.execute(order("save"), PATIENCE_S)
        await asyncio.wait_for(told["files"], PATIENCE_S)

    run(test())


# Commands.


def test_answers_come_in_rank_order_whoever_is_first() -> None:
    async def test() -> None:
        async def late(request: Request) -> str:
            await asyncio.sleep(0.02)
            return "rank 0"

        async def early(request: Request) -> str:
            return "rank 1"

        bridge = Bridge(2)
        await start_ranks(bridge, late, early)
        assert await bridge.execute(order("update"), PATIENCE_S) == ["rank 0", "rank 1"]

    run(test())


def test_each_rank_gets_its_own_command() -> None:
    async def test() -> None:
        def of(rank: int) -> Callable[[Request], Awaitable[Any]]:
            async def reply(request: Request) -> Any:
                return request.command(rank)

            return reply

        bridge = Bridge(2)
        await start_ranks(bridge, of(0), of(1))
        shares = [update(batch="a"), update(batch="b")]
        assert await bridge.execute(order(*shares), PATIENCE_S) == shares
        assert await bridge.execute(order("save"), PATIENCE_S) == [command("save")] * 2

    run(test())


def test_none_is_an_answer_like_any_other() -> None:
    async def test() -> None:
        async def nothing(request: Request) -> None:
            return None

        bridge = Bridge(2)
        await start_ranks(bridge, nothing, nothing)
        assert await bridge.execute(order("save"), PATIENCE_S) == [None, None]

    run(test())


def test_commands_are_given_one_at_a_time() -> None:
    async def test() -> None:
        seen: list[str] = []
        release = asyncio.Event()

        async def reply(request: Request) -> str:
            seen.append(request.command().name)
            await release.wait()
            return request.command().name

        bridge = Bridge(1)
        await start_ranks(bridge, reply)
        first = asyncio.create_task(bridge.execute(order("update"), PATIENCE_S))
        second = asyncio.create_task(bridge.execute(order("publish"), PATIENCE_S))
        await settle()
        assert seen == ["update"]
        release.set()
        assert (await first, await second) == (["update"], ["publish"])
        assert seen == ["update", "publish"]

    run(test())


def test_time_over_gives_none_and_a_late_answer_is_nobodys() -> None:
    async def test() -> None:
        bridge = Bridge(1)
        (poll,) = await listen(bridge, 0)
        assert await bridge.execute(order("update"), 0.01) is None
        late = await poll
        assert late is not None
        pending = asyncio.create_task(bridge.execute(order("save"), PATIENCE_S))
        await settle()
        await bridge.answer(late.request_id, 0, "stale")
        await settle()
        assert not pending.done()
        given = await bridge.next_command(0, GROUP, 0, PATIENCE_S)
        assert given is not None
        assert given.command().name == "save"
        await bridge.answer(given.request_id, 0, "saved")
        assert await pending == ["saved"]

    run(test())


def test_a_failure_ends_the_running_command_and_answers_all_later_ones() -> None:
    async def test() -> None:
        bridge = Bridge(2)
        polls = await listen(bridge, 0, 1)
        pending = asyncio.create_task(bridge.execute(order("update"), PATIENCE_S))
        command = await polls[0]
        assert command is not None
        await bridge.answer(command.request_id, 0, "done")
        await bridge.fail(FAILURE)
        assert await pending == FAILURE
        assert await bridge.execute(order("publish"), PATIENCE_S) == FAILURE
        assert await bridge.next_command(1, GROUP, 0, 0.01) is None, "a failed group is given nothing more"

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
        assert await bridge.next_command(0, GROUP, 0, 0.01) is None
        (polling,) = await listen(bridge, 0)
        assert not polling.done()
        stop = order("stop")
        asking = asyncio.create_task(bridge.execute(stop, PATIENCE_S))
        assert await polling == stop
        await bridge.answer(stop.request_id, 0, None)
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


def test_an_engine_that_wakes_is_given_no_version_that_another_one_has_followed() -> None:
    async def test() -> list[Any]:
        bridge, seen = Bridge(1), []
        await bridge.set_weights(manifest(3), ["ref"])  # For a replica that started late.
        seen.append(await bridge.current_weights())
        await bridge.set_version(4)  # Was sent.
        seen.append(await bridge.current_weights())
        await bridge.set_weights(manifest(2), ["restored"])
        seen.append(await bridge.current_weights())
        return seen

    assert run(test()) == [(manifest(3), ["ref"]), None, (manifest(2), ["restored"])]


def test_a_command_to_a_group_that_is_gone_is_not_held_up_by_one_that_waits_for_its_turn() -> None:
    async def test() -> None:
        bridge = Bridge(1, 1)
        assert not await bridge.wait_turn(0, "next", ("node", "0"), 0.001)
        assert await bridge.execute(order("send"), 5.0) == GroupLost()

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
        names: list[str] = []

        async def publish(request: Request) -> None:
            names.append(request.command().name)
            await bridge.set_weights(manifest(4), ["snapshot"])

        await start_ranks(bridge, publish, version=4)
        await bridge.set_weights(manifest(3), ["old"])
        await bridge.set_version(4)
        assert await bridge.newest_weights(4) == (manifest(4), ["snapshot"])
        assert await bridge.newest_weights(4) == (manifest(4), ["snapshot"])
        assert names == ["publish"]

    run(test())


def test_a_publication_that_a_replica_has_found_to_be_gone_is_made_again() -> None:
    async def test() -> None:
        bridge = Bridge(1)

        async def publish(request: Request) -> None:
            await bridge.set_weights(replace(manifest(3), publication="second"), ["new"])

        await start_ranks(bridge, publish, version=3)
        await bridge.set_weights(manifest(3), ["of a dead process"])
        lost = manifest(3).publication
        second = replace(manifest(3), publication="second"), ["new"]
        assert await bridge.newest_weights(3, lost) == second
        # A slower replica has found the same.
        assert await bridge.newest_weights(3, lost) == second

    run(test())


def test_a_replica_waits_for_the_next_group_where_the_one_that_publishes_is_lost() -> None:
    async def test() -> None:
        bridge = Bridge(1)

        async def publish(request: Request) -> None:
            await bridge.set_weights(manifest(3), ["new"])

        (poll,) = await listen(bridge, 0, version=3)
        asking = asyncio.create_task(bridge.newest_weights(3))
        await poll  # It takes the command, and dies.
        await start_ranks(bridge, publish, group="second", version=3)
        assert await asking == (manifest(3), ["new"])

    run(test())


def test_a_version_that_does_not_exist_is_an_error() -> None:
    async def test() -> None:
        bridge = Bridge(1)

        async def publish(request: Request) -> None:
            await bridge.set_weights(manifest(4), [])

        await start_ranks(bridge, publish, version=9)
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
        told = asyncio.create_task(bridge.set_controller("handle"))
        await settle()
        assert await bridge.controller() == "handle"
        assert not told.done()

    run(test())


def test_where_ranks_run_is_told_in_a_call_that_stays_open_until_they_run_elsewhere() -> None:
    """So that Ray repeats it at a bridge that was started again, and no older one."""

    async def test() -> None:
        bridge = Bridge(1)
        first, second = object(), object()
        calls = [asyncio.create_task(bridge.set_placement_group(group)) for group in (first, second)]
        await settle()
        assert await bridge.placement_group() is second
        assert [call.done() for call in calls] == [True, False]

    run(test())


def test_calls_that_stay_open_end_with_the_run() -> None:
    async def test() -> None:
        bridge = Bridge(1, 1)
        about = {"actor": "actor", "place": ("node", "0")}
        calls = [
            asyncio.create_task(call)
            for call in (
                bridge.set_controller("handle"),
                bridge.set_placement_group("group"),
                bridge.saved("checkpoint", 0, {"a": FILE}),
                bridge.attend_turns("replica", **about),
                bridge.stay_held(0, []),
            )
        ]
        await settle()
        assert not any(call.done() for call in calls)
        await bridge.end_calls()
        await asyncio.wait_for(asyncio.gather(*calls), PATIENCE_S)

    run(test())


# What replicas tell, and what a renewal forgets.


def test_failures_of_replicas_are_kept_until_they_are_taken() -> None:
    async def test() -> None:
        bridge = Bridge(1)
        failures = [ReplicaFailure(told_by=f"replica {name}", message="x", is_new=False) for name in "ab"]
        for failure in failures:
            await bridge.replica_failed(failure)
        assert await bridge.take_replica_failures() == failures
        assert await bridge.take_replica_failures() == []

    run(test())
