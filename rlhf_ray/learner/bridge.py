"""The 0-CPU actor between the Algorithm and its learner workers.

Consumes commands from the Algorithm; each worker long-polls for the next one and posts its answer; the Algorithm is
unblocked when every rank has answered or one has failed. Also holds the newest published ``(manifest, refs)``, so that
a replica or a learner group that starts again finds the state it needs. Plain asyncio: ``bridge_actor`` wraps it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from rlhf_ray.types import Span
from rlhf_ray.weight_sync.manifest import WeightManifest

_SNAPSHOT_TIMEOUT_S = 600.0
# Nobody takes them where the Algorithm is stuck.
_MOST_SPANS = 100_000

__all__ = ["Bridge", "Command", "RankFailure", "bridge_actor"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One order to all ranks."""

    sequence: int
    verb: str
    """``update``, ``publish``, ``send``, ``save``, ``load``, ``export`` or ``stop``."""
    arguments: tuple[Any, ...]
    """One entry a rank, or a single one for all."""

    def argument(self, rank: int) -> Any:
        """The argument meant for ``rank``."""
        return self.arguments[rank] if len(self.arguments) > 1 else self.arguments[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFailure:
    """An exception on one rank."""

    rank: int
    message: str
    """Traceback text."""


@dataclass(slots=True)
class _Pending:
    command: Command
    answers: dict[int, Any] = field(default_factory=dict)
    finished: asyncio.Event = field(default_factory=asyncio.Event)


class Bridge:
    """Command queue, answers and newest weights.

    Args:
        world_size: Number of learner ranks.
    """

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._changed = asyncio.Condition()
        self._pending: _Pending | None = None
        self._sequence = 0
        self._ready: set[int] = set()
        self._failure: RankFailure | None = None
        self._attempt = 0
        self._manifest: WeightManifest | None = None
        self._refs: list[Any] = []
        self._version = 0
        self._commanding = asyncio.Lock()
        self._controller: Any = None
        self._spans: deque[Span] = deque(maxlen=_MOST_SPANS)

    async def register(self, rank: int) -> int:
        """A rank reports that its models are loaded; returns the sequence number to listen after."""
        async with self._changed:
            if rank in self._ready:  # the group was started again
                self._attempt += 1
                self._ready.clear()
            self._ready.add(rank)
            self._changed.notify_all()
            return self._sequence

    async def add_spans(self, spans: list[Span]) -> None:
        """Keep what a rank or a replica did, for the timeline."""
        self._spans.extend(spans)

    async def take_spans(self) -> list[Span]:
        """Give what was kept since the last call."""
        spans = list(self._spans)
        self._spans.clear()
        return spans

    async def attempt(self) -> int:
        """How often the group was started again."""
        return self._attempt

    async def wait_ready(self, timeout_s: float) -> RankFailure | bool:
        """Wait until all ranks registered; a failure as soon as one reports it; ``False`` when time is over."""
        async with self._changed:
            ready = self._changed.wait_for(lambda: self._failure or len(self._ready) == self._world_size)
            try:
                await asyncio.wait_for(ready, timeout_s)
            except TimeoutError:
                return False
            return self._failure or True

    async def execute(self, verb: str, arguments: tuple[Any, ...], timeout_s: float) -> list[Any] | RankFailure | None:
        """Give a command and wait for every rank's answer, in rank order; ``None`` when time is over."""
        async with self._commanding:
            async with self._changed:
                if self._failure is not None:
                    return self._failure
                self._sequence += 1
                command = Command(sequence=self._sequence, verb=verb, arguments=arguments)
                pending = self._pending = _Pending(command=command)
                self._changed.notify_all()
            try:
                await asyncio.wait_for(pending.finished.wait(), timeout_s)
            except TimeoutError:
                return None
            return self._failure or [pending.answers[rank] for rank in range(self._world_size)]

    async def next_command(self, after: int, timeout_s: float) -> Command | None:
        """Long poll of a worker: the command after sequence number ``after``; ``None`` when time is over."""
        async with self._changed:
            arrived = self._changed.wait_for(lambda: self._sequence > after)
            try:
                await asyncio.wait_for(arrived, timeout_s)
            except TimeoutError:
                return None
            return self._pending.command if self._pending is not None else None

    async def answer(self, sequence: int, rank: int, result: Any) -> None:
        """A rank's answer to a command."""
        pending = self._pending
        if pending is None or pending.command.sequence != sequence:
            return  # the Algorithm gave up on that command
        pending.answers[rank] = result
        if len(pending.answers) == self._world_size:
            pending.finished.set()

    async def fail(self, failure: RankFailure) -> None:
        """A rank reports the exception that ends it."""
        async with self._changed:
            self._failure = self._failure or failure
            self._changed.notify_all()
            if self._pending is not None:
                self._pending.finished.set()

    async def set_controller(self, controller: Any) -> None:
        """The Ray Train controller's handle, for an abort."""
        self._controller = controller

    async def controller(self) -> Any:
        """The handle, or ``None`` before the controller runs."""
        return self._controller

    async def set_weights(self, manifest: WeightManifest, refs: list[Any]) -> None:
        """Rank 0 put a version into the object store: the newest from now on."""
        self._manifest, self._refs = manifest, refs
        self._version = manifest.version

    async def set_version(self, version: int) -> None:
        """Rank 0 sent a version over NCCL: nothing of it is in the object store."""
        self._version = version

    async def newest_version(self) -> int:
        """Version of the newest published weights; 0 before the first publication."""
        return self._version

    async def newest_weights(self, min_version: int) -> tuple[WeightManifest, list[Any]]:
        """The newest published weights, for a replica that is behind.

        Where the newest version went over NCCL the learners are told to put it into the object store too.

        Raises:
            RuntimeError: There is no such version, or the learners could not give it.
        """
        if self._manifest is None or self._manifest.version < min_version:
            await self.execute("publish", (None,), _SNAPSHOT_TIMEOUT_S)
        if self._manifest is None or self._manifest.version < min_version:
            raise RuntimeError(f"policy version {min_version} is not to be had, the newest is {self._version}")
        return self._manifest, self._refs


def bridge_actor(world_size: int) -> Any:
    """Start a bridge as an actor on the driver's node."""
    import ray

    # Every rank and every waiting replica holds a long poll open.
    options = {"num_cpus": 0, "max_concurrency": 10_000}
    return ray.remote(**options)(Bridge).remote(world_size)
