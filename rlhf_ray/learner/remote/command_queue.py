"""The bridge's queue of requests: one at a time, taken by every rank of a worker group and answered by all of them.

Plain asyncio, below the bridge's condition. A request names the worker group that it is for: a group that Ray Train has
restarted answers nothing that was asked of the group before it. A queue whose bridge was restarted knows nothing: Ray
repeats the Algorithm's call with the same request, and a rank that has carried it out repeats its answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rlhf_ray.learner.remote.commands import (
    Command,
    GroupLost,
    OffloadCommand,
    RankFailure,
    Request,
    SendCommand,
)
from rlhf_ray.learner.remote.turns import Turns

__all__ = ["CommandQueue"]


@dataclass(slots=True)
class _Pending:
    request: Request
    answers: dict[int, Any] = field(default_factory=dict)
    finished: asyncio.Event = field(default_factory=asyncio.Event)


class CommandQueue:
    """Requests and answers, and who listens for them.

    Args:
        changed: Notified whenever something changes; methods that are not coroutines are called with it held.
        world_size: Number of learner ranks.
        turns: Whose turn it is on GPUs that are shared; ``None``: none are.
        group_began: Called when the first rank of a new worker group listens; whether there was another one before it.
    """

    def __init__(
        self,
        changed: asyncio.Condition,
        *,
        world_size: int,
        turns: Turns | None = None,
        group_began: Callable[[bool], None] = lambda is_restart: None,
    ) -> None:
        self._changed = changed
        self._world_size = world_size
        self._turns = turns
        self._group_began = group_began
        self._executing = asyncio.Lock()
        self._pending: _Pending | None = None
        self._versions: dict[int, int] = {}
        self.group: str | None = None
        """The worker group that listens; ``None`` before one does."""
        self.failure: RankFailure | None = None
        """Why a rank of it ended."""

    async def wait_ready(self, timeout_s: float, *, after: str | None = None) -> RankFailure | str | None:
        """See :meth:`Bridge.wait_ready`."""
        async with self._changed:
            ready = self._changed.wait_for(lambda: self.failure or (self._is_complete() and self.group != after))
            try:
                await asyncio.wait_for(ready, timeout_s)
            except TimeoutError:
                return None
            return self.failure or self.group

    async def group_with(self, version: int) -> str | None:
        """Wait for a worker group with a policy of at least ``version``; its name, ``None`` if a rank has failed.

        A group that was restarted has no such version until its state was restored.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self.failure or (self._is_complete() and self._versions[0] >= version))
            return None if self.failure else self.group

    async def execute(self, request: Request, timeout_s: float) -> list[Any] | RankFailure | GroupLost | None:
        """See :meth:`Bridge.execute`."""
        async with self._executing:
            try:
                async with asyncio.timeout(timeout_s):
                    return await self._answers(request)
            except TimeoutError:
                return None

    def join(self, rank: int, group: str, version: int) -> None:
        """Note that a rank listens, and the version of its policy."""
        self.begin_group(group)
        self._versions[rank] = version
        self._changed.notify_all()

    async def next(self, rank: int, group: str, timeout_s: float) -> Request | None:
        """Wait for a rank's next command, with the condition held; ``None`` when time is over."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait_for(lambda: self._next(rank, group))
        except TimeoutError:
            return None
        request = self._next(rank, group)
        if self._turns is not None and request is not None and request.command().needs_models:
            self._turns.rank_says(rank, resident=True)
        return request

    def answer(self, request_id: str, rank: int, result: Any) -> None:
        """See :meth:`Bridge.answer`."""
        pending = self._pending
        if pending is None or pending.request.request_id != request_id:
            return  # The Algorithm gave up on that request.
        pending.answers[rank] = result
        if len(pending.answers) == self._world_size:
            pending.finished.set()

    def fail(self, failure: RankFailure) -> None:
        """See :meth:`Bridge.fail`."""
        self.failure = self.failure or failure
        self._changed.notify_all()
        if self._pending is not None:
            self._pending.finished.set()

    def begin_group(self, group: str) -> None:
        """The first rank of a new group ends the old one."""
        if group == self.group:
            return
        if self._pending is not None:
            self._pending.finished.set()
        is_restart = self.group is not None  # Else it may be this bridge that is new.
        self.group, self._pending, self.failure = group, None, None
        self._versions.clear()
        if self._turns is not None:
            self._turns.begin_group()
        self._group_began(is_restart)
        self._changed.notify_all()

    def _is_complete(self) -> bool:
        return len(self._versions) == self._world_size

    def _next(self, rank: int, group: str) -> Request | None:
        pending = self._pending
        if (
            pending is not None
            and self.failure is None
            and pending.request.group == group
            and rank not in pending.answers
            and self._may_start(pending.request.command())
        ):
            return pending.request
        if self._turns is not None and group == self.group and self._turns.must_leave(rank):
            return Request(commands=(OffloadCommand(),), group=group)
        return None

    def _may_start(self, command: Command) -> bool:
        """Whether the GPUs are free for a command."""
        if self._turns is None:
            return True
        if isinstance(command, SendCommand):
            return self._turns.ranks_are_away()
        return not command.needs_models or self._turns.engines_sleep()

    async def _answers(self, request: Request) -> list[Any] | RankFailure | GroupLost:
        async with self._changed:
            # A new bridge waits until the ranks have found it; those of another group may await a turn.
            await self._changed.wait_for(
                lambda: self.failure or self._is_complete() or self.group not in (None, request.group)
            )
            if self.failure is not None:
                return self.failure
            if self.group != request.group:
                return GroupLost()
            pending = self._pending = _Pending(request=request)
            self._engines_load(isinstance(request.command(), SendCommand))
            self._changed.notify_all()
        try:
            await pending.finished.wait()
        finally:
            async with self._changed:
                self._engines_load(False)
                self._changed.notify_all()
        if self.group != request.group:
            return GroupLost()
        return self.failure or [pending.answers[rank] for rank in range(self._world_size)]

    def _engines_load(self, now: bool) -> None:
        if self._turns is not None:
            self._turns.engines_load = now
