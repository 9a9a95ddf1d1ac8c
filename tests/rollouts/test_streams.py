from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import RequestCancelledError

from rlhf_ray.rollouts.streams import FinishedGroups, GroupStreams, split_evenly
from rlhf_ray.types import Prompt, RolloutGroup, SamplingSettings, Trajectory

SAMPLING = SamplingSettings(group_size=2, max_new_tokens=4, temperature=1.0)
GREEDY = SamplingSettings(group_size=1, max_new_tokens=4, temperature=0.0)

Script = Callable[[Sequence[Prompt]], AsyncIterator[list[int]]]


class Answer:
    """What the streaming Serve handle returns: an asynchronous iterator that can be cancelled."""

    def __init__(self, positions: AsyncIterator[list[int]]) -> None:
        self._positions = positions
        self.cancelled = False

    async def __aiter__(self) -> AsyncIterator[FinishedGroups]:
        async for finished in self._positions:
            yield "replica", [(position, (completion(position),)) for position in finished]

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """Remembers the requests; ``script`` says in which order the prompts of one are finished."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self.requests: list[tuple[list[int], SamplingSettings, tuple[int, ...], int]] = []
        self.max_tokens: list[tuple[int, ...]] = []
        self.replica_ids: list[str] = []
        self.answers: list[Answer] = []

    def of_replica(self, replica_id: str) -> Handle:
        self.replica_ids.append(replica_id)
        return self

    def __call__(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingSettings,
        *,
        seeds: tuple[int, ...],
        max_tokens: tuple[int, ...],
        min_version: int,
    ) -> Answer:
        self.max_tokens.append(max_tokens)
        self.requests.append(([prompt.prompt_id for prompt in prompts], sampling, seeds, min_version))
        self.answers.append(Answer(self._script(prompts)))
        return self.answers[-1]


def completion(token: int) -> Trajectory:
    return Trajectory.single_turn(
        token_ids=np.asarray([token], dtype=np.int32),
        sampling_logprobs=np.zeros(1, dtype=np.float32),
        asked_version=0,
        version_spans=(),
        finish_reason="stop",
    )


def prompt(number: int) -> Prompt:
    return Prompt(prompt_id=number, token_ids=np.asarray([number], dtype=np.int32), text="")


async def backwards(prompts: Sequence[Prompt]) -> AsyncIterator[list[int]]:
    for position in reversed(range(len(prompts))):
        yield [position]


async def all_at_once(prompts: Sequence[Prompt]) -> AsyncIterator[list[int]]:
    yield list(range(len(prompts)))


async def first_and_no_more(prompts: Sequence[Prompt]) -> AsyncIterator[list[int]]:
    yield [0]
    await asyncio.Event().wait()


async def first_then_death(prompts: Sequence[Prompt]) -> AsyncIterator[list[int]]:
    yield [0]
    raise ActorDiedError()


async def first_then_end(prompts: Sequence[Prompt]) -> AsyncIterator[list[int]]:
    yield [0]


def ask(
    streams: GroupStreams,
    numbers: Sequence[int],
    sampling: SamplingSettings = SAMPLING,
    min_version: int = 0,
    replica_id: str = "",
) -> list[Coroutine[Any, Any, RolloutGroup]]:
    return [
        streams.generate(
            prompt(number),
            sampling,
            seed=number * 10,
            max_tokens=number,
            min_version=min_version,
            replica_id=replica_id,
        )
        for number in numbers
    ]


@pytest.mark.parametrize("script", [backwards, all_at_once])
@pytest.mark.parametrize("num_replicas", [1, 3])
def test_every_caller_gets_its_own_group(script: Script, num_replicas: int) -> None:
    handle = Handle(script)
    streams = GroupStreams(handle.of_replica, num_replicas=num_replicas)
    numbers = [7, 3, 9, 4, 1, *range(20, 40)]

    async def run() -> list[RolloutGroup]:
        return await asyncio.gather(*ask(streams, numbers))

    groups = asyncio.run(run())
    assert [group.group_id for group in groups] == numbers
    assert [group.prompt.prompt_id for group in groups] == numbers
    asked = [number for request, *_ in handle.requests for number in request]
    assert asked == numbers
    by_request = [position for request, *_ in handle.requests for position in range(len(request))]
    assert [int(group.trajectories[0].token_ids[0]) for group in groups] == by_request
    assert {group.replica_id for group in groups} == {"replica"}
    assert [seed for _, _, seeds, _ in handle.requests for seed in seeds] == [number * 10 for number in numbers]


@pytest.mark.parametrize(("num_replicas", "requests"), [(1, 1), (2, 8), (16, 25)])
def test_one_turn_of_the_loop_makes_few_requests(num_replicas: int, requests: int) -> None:
    handle = Handle(all_at_once)
    streams = GroupStreams(handle.of_replica, num_replicas=num_replicas)

    async def run() -> None:
        await asyncio.gather(*ask(streams, range(25)))
        await asyncio.gather(*ask(streams, [30]))

    asyncio.run(run())
    assert len(handle.requests) == requests + 1
    assert handle.requests[-1][0] == [30]


def test_requests_do_not_mix_sampling_or_versions() -> None:
    handle = Handle(all_at_once)
    streams = GroupStreams(handle.of_replica, num_replicas=1)

    async def run() -> None:
        await asyncio.gather(
            *ask(streams, [1, 2]), *ask(streams, [3], GREEDY), *ask(streams, [4], min_version=5), *ask(streams, [5])
        )

    asyncio.run(run())
    assert handle.requests == [
        ([1, 2, 5], SAMPLING, (10, 20, 50), 0),
        ([3], GREEDY, (30,), 0),
        ([4], SAMPLING, (40,), 5),
    ]


def test_a_turn_goes_to_the_replica_that_it_names() -> None:
    handle = Handle(all_at_once)
    streams = GroupStreams(handle.of_replica, num_replicas=2)

    async def run() -> None:
        await asyncio.gather(*ask(streams, [1, 2], replica_id="a"), *ask(streams, [3], replica_id="b"))
        await asyncio.gather(*ask(streams, [4], replica_id="a"))

    asyncio.run(run())
    assert [request for request, *_ in handle.requests] == [[1, 2], [3], [4]]
    assert handle.max_tokens == [(1, 2), (3,), (4,)]
    assert handle.replica_ids == ["a", "b"]


def test_one_replica_leaves_no_choice() -> None:
    handle = Handle(all_at_once)
    streams = GroupStreams(handle.of_replica, num_replicas=1)

    async def run() -> None:
        await asyncio.gather(*ask(streams, [1], replica_id="a"), *ask(streams, [2], replica_id="gone"))

    asyncio.run(run())
    assert [request for request, *_ in handle.requests] == [[1, 2]]
    assert handle.replica_ids == [""]


@pytest.mark.parametrize(("script", "error"), [(first_then_death, ActorDiedError), (first_then_end, RuntimeError)])
def test_a_request_that_ends_early_keeps_what_was_finished(script: Script, error: type[Exception]) -> None:
    streams = GroupStreams(Handle(script).of_replica, num_replicas=1)

    async def run() -> list[RolloutGroup | BaseException]:
        return await asyncio.gather(*ask(streams, [1, 2, 3]), return_exceptions=True)

    first, *others = asyncio.run(run())
    assert isinstance(first, RolloutGroup)
    assert first.group_id == 1
    assert [type(other) for other in others] == [error, error]


def test_a_request_is_cancelled_with_the_last_of_its_callers() -> None:
    handle = Handle(first_and_no_more)
    streams = GroupStreams(handle.of_replica, num_replicas=1)

    async def run() -> None:
        tasks = [asyncio.create_task(call) for call in ask(streams, [1, 2, 3])]
        await tasks[0]
        tasks[1].cancel()
        await asyncio.wait(tasks[1:], timeout=0.01)
        assert not handle.answers[0].cancelled
        tasks[2].cancel()
        await asyncio.wait(tasks[1:], timeout=1.0)
        await asyncio.sleep(0.01)

    asyncio.run(run())
    assert handle.answers[0].cancelled


def test_a_finished_request_is_not_cancelled() -> None:
    handle = Handle(all_at_once)

    async def run() -> None:
        await asyncio.gather(*ask(GroupStreams(handle.of_replica, num_replicas=1), [1, 2]))
        await asyncio.sleep(0.01)

    asyncio.run(run())
    assert not handle.answers[0].cancelled


@pytest.mark.parametrize(
    ("count", "parts", "lengths"),
    [(5, 2, [2, 3]), (4, 4, [1, 1, 1, 1]), (3, 8, [1, 1, 1]), (7, 1, [7]), (10, 4, [2, 3, 2, 3])],
)
def test_split_evenly(count: int, parts: int, lengths: list[int]) -> None:
    pieces = split_evenly(list(range(count)), parts)
    assert [len(piece) for piece in pieces] == lengths
    assert [item for piece in pieces for item in piece] == list(range(count))


async def ended_by_its_replica(prompts: Sequence[Prompt]) -> AsyncIterator[list[int]]:
    yield [0]
    # What Serve's iterator raises when the request was cancelled at the other end.
    raise asyncio.CancelledError


def test_a_request_that_ends_with_its_replica_is_one_to_send_again() -> None:
    streams = GroupStreams(Handle(ended_by_its_replica).of_replica, num_replicas=1)

    async def run() -> list[Any]:
        return await asyncio.wait_for(asyncio.gather(*ask(streams, [1, 2]), return_exceptions=True), 5.0)

    first, second = asyncio.run(run())
    assert isinstance(first, RolloutGroup)
    assert isinstance(second, RequestCancelledError)


def test_a_handle_that_raises_at_once_answers_every_caller() -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ActorDiedError()

    streams = GroupStreams(lambda _: broken, num_replicas=1)

    async def run() -> list[Any]:
        return await asyncio.wait_for(asyncio.gather(*ask(streams, [1, 2]), return_exceptions=True), 5.0)

    assert [type(outcome) for outcome in asyncio.run(run())] == [ActorDiedError, ActorDiedError]
