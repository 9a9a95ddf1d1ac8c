"""Which files of a checkpoint the ranks have written; a part of the bridge, below its condition."""

from __future__ import annotations

import asyncio
from typing import TypeAlias

from rlhf_ray.checkpoints.folder import StoredFile
from rlhf_ray.learner.remote.command_queue import CommandQueue
from rlhf_ray.learner.remote.commands import GroupLost, RankFailure

__all__ = ["SaveTracker"]

_Files: TypeAlias = dict[str, StoredFile]


class SaveTracker:
    """Answers of all ranks per checkpoint.

    Args:
        changed: Notified whenever something changes; methods that are not coroutines are called with it held.
        world_size: Number of learner ranks.
        queue: Knows which worker group listens and whether a rank has failed.
    """

    def __init__(self, changed: asyncio.Condition, *, world_size: int, queue: CommandQueue) -> None:
        self._changed = changed
        self._world_size = world_size
        self._queue = queue
        self._answers: dict[str, dict[int, _Files | RankFailure]] = {}
        self._taken: set[str] = set()

    async def add(self, save_id: str, rank: int, files: _Files | RankFailure) -> None:
        """See :meth:`Bridge.saved`."""
        async with self._changed:
            self._answers.setdefault(save_id, {})[rank] = files
            self._changed.notify_all()
            await self._changed.wait_for(lambda: save_id not in self._answers)

    async def wait(self, save_id: str, group: str, timeout_s: float) -> _Files | RankFailure | GroupLost | None:
        """See :meth:`Bridge.wait_saved`."""
        async with self._changed:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait_for(lambda: self._outcome(save_id, group) is not None)
            except TimeoutError:
                return None
            self._taken.add(save_id)
            return self._outcome(save_id, group)

    def begin(self) -> None:
        """The next checkpoint begins: what was taken of those before is needed no more."""
        for save_id in self._taken:
            self._answers.pop(save_id, None)
        self._taken.clear()

    def clear(self) -> None:
        """The worker group was restarted, or the run ends."""
        self._answers.clear()

    def _outcome(self, save_id: str, group: str) -> _Files | RankFailure | GroupLost | None:
        if self._queue.group not in (None, group):
            return GroupLost()
        answers = self._answers.get(save_id, {})
        failed = next((each for each in answers.values() if isinstance(each, RankFailure)), self._queue.failure)
        if failed is not None or len(answers) < self._world_size:
            return failed
        return {name: file for files in answers.values() if isinstance(files, dict) for name, file in files.items()}
