"""The 0-CPU actor between the Algorithm and its learner workers.

Consumes requests from the Algorithm; each rank long-polls for its next command and posts its answer; the Algorithm is
unblocked when every rank has answered or one has failed. It is composed of a :class:`CommandQueue`, a
:class:`WeightRegistry` with the newest published weights, a :class:`SaveTracker`, :class:`Turns` where GPUs are shared,
and is itself the :class:`StateKeeper` of the ranks on its own node, so that a replica or a worker group that starts
again finds what it needs. Plain asyncio: ``bridge_actor`` wraps it.

Workers and bridge may die, each by itself. A bridge that was restarted knows nothing: Ray repeats every call that had
no answer, so a call that tells what the bridge must know stays open until that is true no longer. Weights alone are not
told again: the learners publish them again when a replica needs them.
"""

from __future__ import annotations

import asyncio
from typing import Any

from rlhf_ray.checkpoints.folder import StoredFile
from rlhf_ray.learner.remote.command_queue import CommandQueue
from rlhf_ray.learner.remote.commands import GroupLost, RankFailure, Request, SaveCommand
from rlhf_ray.learner.remote.save_tracker import SaveTracker
from rlhf_ray.learner.remote.state_keeper import StateKeeper, keeper_on
from rlhf_ray.learner.remote.turns import Place, Turns
from rlhf_ray.learner.remote.weight_registry import WeightRegistry
from rlhf_ray.span_log import SpanLog
from rlhf_ray.types import TraceSpan
from rlhf_ray.weight_sync.manifest import ReplicaFailure, WeightManifest
from rlhf_ray.worker_env import worker_env

# No process takes them while the Algorithm is stuck.
_MAX_SPANS = 100_000
_MAX_FAILURES = 1_000
_ANSWERS_LEAVE_S = 0.2

__all__ = ["Bridge", "bridge_actor"]


class Bridge(StateKeeper):
    """What the Algorithm, the learner ranks and the replicas call.

    Args:
        world_size: Number of learner ranks.
        num_engines: Replicas that share the ranks' GPUs; 0: each has its own.
    """

    def __init__(self, world_size: int, num_engines: int = 0) -> None:
        super().__init__()
        self._changed = asyncio.Condition()
        self._turns: Turns | None = None
        if num_engines:
            self._turns = Turns(self._changed, num_ranks=world_size, num_engines=num_engines)
        self._queue = CommandQueue(
            self._changed, world_size=world_size, turns=self._turns, group_began=self._group_began
        )
        self._weights = WeightRegistry(self._queue, self._turns)
        self._saves = SaveTracker(self._changed, world_size=world_size, queue=self._queue)
        self._controller: Any = None
        self._keepers: dict[str, Any] = {}
        self._placement_group: Any = None
        self._spans = SpanLog(most=_MAX_SPANS)
        self._replica_failures: list[ReplicaFailure] = []

    def _group_began(self, is_restart: bool) -> None:
        self._weights.forget()
        if is_restart:
            self._saves.clear()

    # Commands.

    async def wait_ready(self, timeout_s: float, *, after: str | None = None) -> RankFailure | str | None:
        """Wait until all ranks of a worker group other than ``after`` have asked for commands.

        Returns:
            The group; a failure as soon as one reports it; ``None`` when time is over.
        """
        return await self._queue.wait_ready(timeout_s, after=after)

    async def group(self) -> str | None:
        """The worker group that listens; ``None`` before one does, or while it may not: it is the engines' turn."""
        return self._queue.group if self._turns is None or self._turns.is_wanted else None

    async def execute(self, request: Request, timeout_s: float) -> list[Any] | RankFailure | GroupLost | None:
        """Give every rank its command and wait for all answers, in rank order; ``None`` when time is over."""
        if isinstance(request.command(), SaveCommand):
            async with self._changed:
                self._saves.begin()
                self._changed.notify_all()
        return await self._queue.execute(request, timeout_s)

    async def next_command(
        self,
        rank: int,
        group: str,
        version: int,
        timeout_s: float,
        resident: bool = True,
        place: Place | None = None,
    ) -> Request | None:
        """Long poll of a rank that holds policy ``version``: what it has not answered yet; ``None`` when time is over.

        A rank may be given a request that it has carried out, if this bridge does not know its answer.

        Args:
            rank: Which one.
            group: Its worker group.
            version: Of its policy.
            timeout_s: Longest wait.
            resident: Whether its models are on its GPU; where that is shared, it may be told to take them off.
            place: Its GPU, where that is shared.
        """
        async with self._changed:
            self._queue.join(rank, group, version)
            if self._turns is not None:
                self._turns.rank_says(rank, resident=resident, place=place)
            return await self._queue.next(rank, group, timeout_s)

    async def answer(self, request_id: str, rank: int, result: Any) -> None:
        """A rank's answer to a request."""
        self._queue.answer(request_id, rank, result)

    async def fail(self, failure: RankFailure) -> None:
        """A rank reports the exception that ends it."""
        async with self._changed:
            self._queue.fail(failure)

    # Turns on GPUs that replicas and learners share.

    async def hold_turn(self, token: str) -> None:
        """See :meth:`Turns.hold`."""
        if self._turns is not None:
            await self._turns.hold(token)

    async def give_turn_back(self, token: str) -> None:
        """See :meth:`Turns.give_back`."""
        if self._turns is not None:
            await self._turns.give_back(token)

    async def wait_away(self, timeout_s: float) -> bool:
        """See :meth:`Turns.wait_away`; whether time is over."""
        try:
            async with asyncio.timeout(timeout_s):
                if self._turns is not None:
                    await self._turns.wait_away()
        except TimeoutError:
            return True
        return False

    async def attend_turns(self, replica_id: str, actor: Any, place: Place) -> None:
        """See :meth:`Turns.attend`."""
        assert self._turns is not None, "replicas and learners share no GPUs"
        await self._turns.attend(replica_id, actor=actor, place=place)

    async def follow_turn(
        self, replica_id: str, *, awake: bool, actor: Any, place: Place, timeout_s: float
    ) -> bool | None:
        """See :meth:`Turns.follow`."""
        assert self._turns is not None, "replicas and learners share no GPUs"
        return await self._turns.follow(replica_id, awake=awake, actor=actor, place=place, timeout_s=timeout_s)

    async def places(self) -> tuple[dict[str, Place], dict[int, Place]]:
        """See :meth:`Turns.places`."""
        return ({}, {}) if self._turns is None else await self._turns.places()

    async def wait_turn(self, rank: int, group: str, place: Place, timeout_s: float) -> bool:
        """Long poll of a rank that has no models yet: whether it may build them."""
        assert self._turns is not None, "replicas and learners share no GPUs"
        turns = self._turns
        async with self._changed:
            self._queue.begin_group(group)
            turns.rank_says(rank, resident=False, place=place)
            try:
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait_for(
                        lambda: group == self._queue.group and turns.is_wanted and turns.engines_sleep()
                    )
            except TimeoutError:
                return False
            turns.rank_says(rank, resident=True)
            return True

    # Checkpoints and kept states.

    async def saved(self, save_id: str, rank: int, files: dict[str, StoredFile] | RankFailure) -> None:
        """A rank's files of a checkpoint are written, or cannot be; ``save_id`` is the request that asked for them.

        Stays open until they were taken and the next checkpoint begins, or the worker group ends.
        """
        await self._saves.add(save_id, rank, files)

    async def wait_saved(
        self, save_id: str, group: str, timeout_s: float
    ) -> dict[str, StoredFile] | RankFailure | GroupLost | None:
        """Wait for the files of a checkpoint of every rank of a group; ``None`` when time is over."""
        return await self._saves.wait(save_id, group, timeout_s)

    async def keeper(self, node_id: str) -> Any:
        """Handle of the actor that holds the files of the ranks on a node: this one, or one that is started there."""
        if node_id not in self._keepers:
            self._keepers[node_id] = keeper_on(node_id)
        return self._keepers[node_id]

    # Published weights.

    async def set_weights(self, manifest: WeightManifest, refs: list[Any]) -> None:
        """Rank 0 put a version into the object store: the newest from now on."""
        self._weights.set(manifest, refs)

    async def set_version(self, version: int) -> None:
        """Rank 0 sent a version over NCCL: nothing of it is in the object store."""
        self._weights.version = version

    async def newest_version(self) -> int:
        """Version of the newest published weights; 0 before the first publication."""
        return self._weights.version

    async def newest_weights(self, min_version: int, lost: str | None = None) -> tuple[WeightManifest, list[Any]]:
        """The newest published weights, for a replica that is behind.

        Where the newest version is not in the object store (it went over NCCL, or went with the rank that had put it
        there) the learners are told to put it there, as soon as they have it again.

        Args:
            min_version: What the replica needs.
            lost: A publication that it has found to be gone.

        Raises:
            RuntimeError: There is no such version, or the learners could not give it.
        """
        return await self._weights.newest(min_version, lost)

    async def current_weights(self) -> tuple[WeightManifest, list[Any]] | None:
        """The newest published weights if they are in the object store; the learners are not asked for them."""
        return self._weights.current()

    # What only passes through.

    async def add_spans(self, spans: list[TraceSpan]) -> None:
        """Keep what a rank or a replica did, for the timeline."""
        self._spans.add(*spans)

    async def take_spans(self) -> list[TraceSpan]:
        """Return what was kept since the last call."""
        return self._spans.take()

    async def replica_failed(self, failure: ReplicaFailure) -> None:
        """A replica tells why it could not load weights."""
        if len(self._replica_failures) < _MAX_FAILURES:
            self._replica_failures.append(failure)

    async def take_replica_failures(self) -> list[ReplicaFailure]:
        """Return what replicas told since the last call."""
        failures, self._replica_failures = self._replica_failures, []
        return failures

    async def set_controller(self, controller: Any) -> None:
        """The Ray Train controller's handle, for an abort; stays open until there is another."""
        async with self._changed:
            self._controller = controller
            self._changed.notify_all()
            await self._changed.wait_for(lambda: self._controller is not controller)

    async def controller(self) -> Any:
        """The handle, or ``None`` before the controller runs."""
        return self._controller

    async def set_placement_group(self, group: Any) -> None:
        """Where the ranks run; stays open until that is elsewhere."""
        async with self._changed:
            self._placement_group = group
            self._changed.notify_all()
            await self._changed.wait_for(lambda: self._placement_group is not group)

    async def placement_group(self) -> Any:
        """Where the ranks run, or ``None`` before they do."""
        return self._placement_group

    async def end_calls(self) -> None:
        """Answer the calls that stay open, since the run ends: Ray would tell of each that it is repeated."""
        async with self._changed:
            self._controller = self._placement_group = None
            self._saves.clear()
            if self._turns is not None:
                self._turns.forget_engines()
            self._changed.notify_all()
        for replaced in self._replaced.values():
            replaced.set()
        # This actor is killed as soon as this call has its answer; theirs must have left by then.
        await asyncio.sleep(_ANSWERS_LEAVE_S)


def bridge_actor(world_size: int, num_engines: int = 0) -> Any:
    """Start a bridge as an actor on the driver's node; it is started again, and calls repeated, whenever it dies."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    options = {
        "num_cpus": 0,
        # Every rank and every waiting replica holds a long poll open.
        "max_concurrency": 10_000,
        "max_restarts": -1,
        "max_task_retries": -1,
        # Ray puts actors that need nothing on any node, and elsewhere at the next start.
        "scheduling_strategy": NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False),
        "runtime_env": worker_env(),
    }
    return ray.remote(**options)(Bridge).remote(world_size, num_engines)
