"""Between the rollout flow and the replicas: few streamed Serve requests instead of one call per group.

The flow asks for one group at a time. A Serve call costs milliseconds on both sides, more than a short
completion does, and calls that trickle in keep the engine's steps small. Groups asked for in the same turn of the event
loop therefore go out together, and each comes back as soon as it is finished.
"""

from __future__ import annotations

import asyncio
import functools
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from rlhf_ray.types import Prompt, RolloutGroup, SamplingSettings, Trajectory

__all__ = ["FinishedGroups", "GroupStreams", "cancel_all", "split_evenly"]


async def cancel_all(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks; returns when all have ended, however they did."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


FinishedGroups: TypeAlias = tuple[str, list[tuple[int, tuple[Trajectory, ...]]]]

"""A replica's id, and the groups finished since its last answer: position in the request and completions."""


# Serve balances requests, not groups: with several per replica none gets twice the work of another.
_REQUESTS_PER_REPLICA = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    prompt: Prompt
    seed: int
    max_tokens: int
    group: asyncio.Future[RolloutGroup]


class GroupStreams:
    """An awaitable call per group over streamed requests; use it on one event loop.

    Args:
        generate: ``generate(replica_id)`` gives ``f(prompts, sampling, seeds=, max_tokens=, min_version=)`` ->
            asynchronous iterator of :data:`FinishedGroups` with a ``cancel`` method: the Serve handle's method,
            streaming, which that replica answers if it lives (empty: any).
        num_replicas: Size of the pool.
    """

    def __init__(self, generate: Callable[[str], Callable[..., Any]], *, num_replicas: int) -> None:
        self._generate = functools.lru_cache(maxsize=1024)(generate)
        self._has_choice = num_replicas > 1
        self._max_requests = 1 if num_replicas == 1 else num_replicas * _REQUESTS_PER_REPLICA
        self._waiting: dict[tuple[SamplingSettings, int, str], list[_Call]] = defaultdict(list)
        self._streams: set[asyncio.Task[None]] = set()

    async def generate(
        self,
        prompt: Prompt,
        sampling: SamplingSettings,
        *,
        seed: int,
        max_tokens: int,
        min_version: int,
        replica_id: str = "",
    ) -> RolloutGroup:
        """Write one rollout group with weights of ``min_version`` or newer.

        Raises whatever ended the request that the group was part of.
        """
        loop = asyncio.get_running_loop()
        if not self._waiting:
            # After all tasks that are ready now have asked for theirs.
            loop.call_soon(self._send)
        call = _Call(prompt=prompt, seed=seed, max_tokens=max_tokens, group=loop.create_future())
        self._waiting[sampling, min_version, replica_id if self._has_choice else ""].append(call)
        return await call.group

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, defaultdict(list)
        for key, calls in waiting.items():
            for part in split_evenly(calls, 1 if key[2] else self._max_requests):
                stream = asyncio.get_running_loop().create_task(self._receive(part, *key))
                self._streams.add(stream)  # the loop itself holds tasks weakly
                stream.add_done_callback(self._streams.discard)
                _cancel_with(stream, part)

    async def _receive(
        self, calls: Sequence[_Call], sampling: SamplingSettings, min_version: int, replica_id: str
    ) -> None:
        answers: Any = None
        try:
            answers = self._generate(replica_id)(
                tuple(call.prompt for call in calls),
                sampling,
                seeds=tuple(call.seed for call in calls),
                max_tokens=tuple(call.max_tokens for call in calls),
                min_version=min_version,
            )
            await _deliver(answers, calls)
            error: BaseException = RuntimeError("the replica ended its answer before all groups were in it")
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                if answers is not None:
                    answers.cancel()
                raise
            from ray.serve.exceptions import RequestCancelledError

            # Serve's word for a request that ended with its replica.
            error = RequestCancelledError()
        except Exception as caught:
            error = caught
        for call in calls:
            if not call.group.done():
                call.group.set_exception(error)


async def _deliver(answers: AsyncIterator[FinishedGroups], calls: Sequence[_Call]) -> None:
    async for replica_id, finished in answers:
        for position, completions in finished:
            call = calls[position]
            if not call.group.done():
                group = RolloutGroup(
                    group_id=call.prompt.prompt_id, prompt=call.prompt, trajectories=completions, replica_id=replica_id
                )
                call.group.set_result(group)


def _cancel_with(stream: asyncio.Task[None], calls: Sequence[_Call]) -> None:
    """End a stream that no caller waits for any more."""

    def check(group: asyncio.Future[RolloutGroup]) -> None:
        if group.cancelled() and all(call.group.done() for call in calls):
            stream.cancel()

    for call in calls:
        call.group.add_done_callback(check)


def split_evenly(items: Sequence[Any], parts: int) -> list[Sequence[Any]]:
    """At most ``parts`` pieces that keep the order and differ in length by at most one."""
    parts = min(parts, len(items))
    return [items[len(items) * part // parts : len(items) * (part + 1) // parts] for part in range(parts)]
