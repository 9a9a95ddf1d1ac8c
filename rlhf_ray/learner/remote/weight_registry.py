"""Where the newest published weights are; a part of the bridge."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import suppress
from typing import Any, TypeAlias

from rlhf_ray.learner.remote.command_queue import CommandQueue
from rlhf_ray.learner.remote.commands import GroupLost, PublishCommand, Request
from rlhf_ray.learner.remote.turns import Turns
from rlhf_ray.weight_sync.manifest import WeightManifest

__all__ = ["WeightRegistry"]

# A publication for a replica that starts waits for the update that is under way, whose own limit is the Algorithm's.
_SNAPSHOT_TIMEOUT_S = 7200.0

_Weights: TypeAlias = tuple[WeightManifest, list[Any]]


class WeightRegistry:
    """Manifest and object references of the newest publication.

    Args:
        queue: To have the learners publish for a replica that is behind.
        turns: Whose turn it is on GPUs that are shared; ``None``: none are.
    """

    def __init__(self, queue: CommandQueue, turns: Turns | None) -> None:
        self._queue = queue
        self._turns = turns
        self._weights: _Weights | None = None
        self.version = 0
        """Of the newest publication, through the object store or not; 0 before the first one."""

    def set(self, manifest: WeightManifest, refs: list[Any]) -> None:
        """Rank 0 put a version into the object store: the newest from now on."""
        self._weights, self.version = (manifest, refs), manifest.version

    def forget(self) -> None:
        """What rank 0 had put into the object store went with it."""
        self._weights = None

    async def newest(self, min_version: int, lost: str | None = None) -> _Weights:
        """See :meth:`Bridge.newest_weights`."""
        if self._weights is not None and self._weights[0].publication == lost:
            self._weights = None
        if self._stored(min_version) is None:
            with suppress(TimeoutError):
                async with asyncio.timeout(_SNAPSHOT_TIMEOUT_S):
                    await self._publish(min_version)
        weights = self._stored(min_version)
        if weights is None:
            raise RuntimeError(f"policy version {min_version} is not available, the newest is {self.version}")
        return weights

    def current(self) -> _Weights | None:
        """The newest published weights if they are in the object store."""
        return self._weights if self._weights is not None and self._weights[0].version == self.version else None

    def _stored(self, min_version: int) -> _Weights | None:
        return self._weights if self._weights is not None and self._weights[0].version >= min_version else None

    async def _publish(self, min_version: int) -> None:
        if self._turns is None:
            await self._publish_now(min_version)
            return
        token = uuid.uuid4().hex
        held = asyncio.ensure_future(self._turns.hold(token))
        try:
            await self._publish_now(min_version)
        finally:
            await self._turns.give_back(token)
            await held

    async def _publish_now(self, min_version: int) -> None:
        answer: Any = GroupLost()
        while isinstance(answer, GroupLost):
            group = await self._queue.group_with(min_version)
            if group is None:
                return
            answer = await self._queue.execute(Request(commands=(PublishCommand(),), group=group), _SNAPSHOT_TIMEOUT_S)
