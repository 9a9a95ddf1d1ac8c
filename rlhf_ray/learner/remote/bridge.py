"""The 0-CPU actor between the Algorithm and its learner workers.

Consumes commands from the Algorithm; each worker long-polls for the next one and posts its answer; the Algorithm is
unblocked when every rank has answered or one has failed. Also holds the newest published ``(manifest, refs)`` and is a
:class:`StateKeeper` for the ranks on its own node, so that a replica or a worker group that starts again finds what it
needs. Plain asyncio: ``bridge_actor`` wraps it.

Workers and bridge may die, each by itself. A command names the worker group that it is for: one that Ray Train has
started again answers nothing that was asked of the group before it. A bridge that was started again knows nothing: Ray
repeats every call that had no answer. The Algorithm's comes with the same command, and a rank that has carried it out
repeats its answer; a call that tells what the bridge must know stays open until that is true no longer. Weights alone
are not told again: the learners publish them once more when a replica needs them.
"""

from __future__ import annotations

import asyncio
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from rlhf_ray.checkpoints.folder import StoredFile
from rlhf_ray.learner.remote.state_keeper import StateKeeper, keeper_on
from rlhf_ray.learner.remote.turns import Place, Turns
from rlhf_ray.span_log import SpanLog
from rlhf_ray.types import TraceSpan
from rlhf_ray.weight_sync.manifest import WeightManifest
from rlhf_ray.weight_sync.replica_lost import ReplicaFailure
from rlhf_ray.worker_env import worker_env

# A publication for a replica that starts waits for the update that is under way, whose own limit is the Algorithm's.
_SNAPSHOT_TIMEOUT_S = 7200.0
# Nobody takes them where the Algorithm is stuck.
_MOST_SPANS = 100_000
_MOST_FAILURES = 1_000
_ANSWERS_LEAVE_S = 0.2
# What a rank does without its models.
_WITHOUT_MODELS = frozenset({"layout", "stop", "offload", "send"})

__all__ = ["Bridge", "Command", "GroupLost", "RankFailure", "Refusal", "bridge_actor"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One order to all ranks of a worker group."""

    verb: str
    """``layout``, ``update``, ``publish``, ``stage``, ``send``, ``save``, ``load``, ``recall``, ``renew``, ``export``
    or ``stop``; ``offload`` is the bridge's own, for a rank whose turn is over."""
    arguments: tuple[Any, ...]
    """One entry a rank, or a single one for all."""
    group: str
    """The worker group that it is for."""
    command_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def argument(self, rank: int) -> Any:
        """The argument meant for ``rank``."""
        return self.arguments[rank] if len(self.arguments) > 1 else self.arguments[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFailure:
    """An exception on one rank."""

    rank: int
    message: str
    """Traceback text."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A rank's answer to a command that must not be carried out; all ranks agree, and can take the next one."""

    message: str
    half_done: bool = False
    """Whether weights are those of no version, until the ranks recall one."""


@dataclass(frozen=True, slots=True)
class GroupLost:
    """The worker group that was asked is gone; another one is in its place."""


@dataclass(slots=True)
class _Pending:
    command: Command
    answers: dict[int, Any] = field(default_factory=dict)
    finished: asyncio.Event = field(default_factory=asyncio.Event)


class Bridge(StateKeeper):
    """Command queue, answers and newest weights.

    Args:
        world_size: Number of learner ranks.
        num_engines: Replicas that share the ranks' GPUs; 0: each has its own.
    """

    def __init__(self, world_size: int, num_engines: int = 0) -> None:
        super().__init__()
        self._world_size = world_size
        self._changed = asyncio.Condition()
        self._turns: Turns | None = None
        if num_engines:
            self._turns = Turns(self._changed, num_ranks=world_size, num_engines=num_engines)
        self._pending: _Pending | None = None
        self._group: str | None = None
        self._versions: dict[int, int] = {}
        self._failure: RankFailure | None = None
        self._manifest: WeightManifest | None = None
        self._refs: list[Any] = []
        self._version = 0
        self._saved: dict[str, dict[int, dict[str, StoredFile] | RankFailure]] = {}
        self._taken: set[str] = set()
        self._commanding = asyncio.Lock()
        self._controller: Any = None
        self._keepers: dict[str, Any] = {}
        self._placement_group: Any = None
        self._spans = SpanLog(most=_MOST_SPANS)
        self._replica_failures: list[ReplicaFailure] = []

    async def add_spans(self, spans: list[TraceSpan]) -> None:
        """Keep what a rank or a replica did, for the timeline."""
        self._spans.add(*spans)

    async def take_spans(self) -> list[TraceSpan]:
        """Give what was kept since the last call."""
        return self._spans.take()

    async def wait_ready(self, timeout_s: float, *, after: str | None = None) -> RankFailure | str | None:
        """Wait until all ranks of a worker group other than ``after`` have asked for commands.

        Returns:
            The group; a failure as soon as one reports it; ``None`` when time is over.
        """
        async with self._changed:
            ready = self._changed.wait_for(lambda: self._failure or (self._is_complete() and self._group != after))
            try:
                await asyncio.wait_for(ready, timeout_s)
            except TimeoutError:
                return None
            return self._failure or self._group

    async def group(self) -> str | None:
        """The worker group that listens; ``None`` before one does, or while it may not: it is the engines' turn."""
        return self._group if self._turns is None or self._turns.is_wanted else None

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
            self._begin(group)
            turns.rank_says(rank, resident=False, place=place)
            try:
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait_for(
                        lambda: group == self._group and turns.is_wanted and turns.engines_sleep()
                    )
            except TimeoutError:
                return False
            turns.rank_says(rank, resident=True)
            return True

    async def execute(self, command: Command, timeout_s: float) -> list[Any] | RankFailure | GroupLost | None:
        """Give a command and wait for every rank's answer, in rank order; ``None`` when time is over."""
        async with self._commanding:
            try:
                async with asyncio.timeout(timeout_s):
                    return await self._answers(command)
            except TimeoutError:
                return None

    async def next_command(
        self,
        rank: int,
        group: str,
        version: int,
        timeout_s: float,
        resident: bool = True,
        place: Place | None = None,
    ) -> Command | None:
        """Long poll of a rank that holds policy ``version``: what it has not answered yet; ``None`` when time is over.

        A rank may be given a command that it has carried out, if this bridge does not know its answer.

        Args:
            rank: Which one.
            group: Its worker group.
            version: Of its policy.
            timeout_s: Longest wait.
            resident: Whether its models are on its GPU; where that is shared, it may be told to take them off.
            place: Its GPU, where that is shared.
        """
        async with self._changed:
            self._join(rank, group, version)
            if self._turns is not None:
                self._turns.rank_says(rank, resident=resident, place=place)
            try:
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait_for(lambda: self._order(rank, group))
            except TimeoutError:
                return None
            command = self._order(rank, group)
            if self._turns is not None and command is not None and command.verb not in _WITHOUT_MODELS:
                self._turns.rank_says(rank, resident=True)
            return command

    async def answer(self, command_id: str, rank: int, result: Any) -> None:
        """A rank's answer to a command."""
        pending = self._pending
        if pending is None or pending.command.command_id != command_id:
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

    async def saved(self, save_id: str, rank: int, files: dict[str, StoredFile] | RankFailure) -> None:
        """A rank's files of a checkpoint are written, or cannot be; ``save_id`` is the command that asked for them.

        Stays open until they were taken and the next checkpoint begins, or the worker group ends.
        """
        async with self._changed:
            self._saved.setdefault(save_id, {})[rank] = files
            self._changed.notify_all()
            await self._changed.wait_for(lambda: save_id not in self._saved)

    async def wait_saved(
        self, save_id: str, group: str, timeout_s: float
    ) -> dict[str, StoredFile] | RankFailure | GroupLost | None:
        """Wait for the files of a checkpoint of every rank of a group; ``None`` when time is over."""

        def outcome() -> dict[str, StoredFile] | RankFailure | GroupLost | None:
            if self._group not in (None, group):
                return GroupLost()
            answers = self._saved.get(save_id, {})
            failed = next((answer for answer in answers.values() if isinstance(answer, RankFailure)), self._failure)
            if failed is not None or len(answers) < self._world_size:
                return failed
            return {name: file for files in answers.values() if isinstance(files, dict) for name, file in files.items()}

        async with self._changed:
            done = self._changed.wait_for(lambda: outcome() is not None)
            try:
                await asyncio.wait_for(done, timeout_s)
            except TimeoutError:
                return None
            self._taken.add(save_id)
            return outcome()

    async def replica_failed(self, failure: ReplicaFailure) -> None:
        """A replica tells why it could not load weights."""
        if len(self._replica_failures) < _MOST_FAILURES:
            self._replica_failures.append(failure)

    async def take_replica_failures(self) -> list[ReplicaFailure]:
        """Give what replicas told since the last call."""
        told, self._replica_failures = self._replica_failures, []
        return told

    async def set_controller(self, controller: Any) -> None:
        """The Ray Train controller's handle, for an abort; stays open until there is another."""
        async with self._changed:
            self._controller = controller
            self._changed.notify_all()
            await self._changed.wait_for(lambda: self._controller is not controller)

    async def controller(self) -> Any:
        """The handle, or ``None`` before the controller runs."""
        return self._controller

    async def keeper(self, node_id: str) -> Any:
        """Handle of the actor that holds the files of the ranks on a node: this one, or one that is started there."""
        if node_id not in self._keepers:
            self._keepers[node_id] = keeper_on(node_id)
        return self._keepers[node_id]

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
            self._saved.clear()
            if self._turns is not None:
                self._turns.forget_engines()
            self._changed.notify_all()
        for replaced in self._replaced.values():
            replaced.set()
        # This actor is killed as soon as this call has its answer; theirs must have left by then.
        await asyncio.sleep(_ANSWERS_LEAVE_S)

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

    async def newest_weights(self, min_version: int, lost: str | None = None) -> tuple[WeightManifest, list[Any]]:
        """The newest published weights, for a replica that is behind.

        Where the newest version is not in the object store (it went over NCCL, or went with the rank that had put it
        there) the learners are told to put it there, once they have got it back.

        Args:
            min_version: What the replica needs.
            lost: A publication that it has found to be gone.

        Raises:
            RuntimeError: There is no such version, or the learners could not give it.
        """
        if self._manifest is not None and self._manifest.publication == lost:
            self._manifest, self._refs = None, []
        if not self._has(min_version):
            with suppress(TimeoutError):
                async with asyncio.timeout(_SNAPSHOT_TIMEOUT_S):
                    await self._publish(min_version)
        if self._manifest is None or not self._has(min_version):
            raise RuntimeError(f"policy version {min_version} is not to be had, the newest is {self._version}")
        return self._manifest, self._refs

    async def current_weights(self) -> tuple[WeightManifest, list[Any]] | None:
        """The newest published weights if they are in the object store; the learners are not asked for them."""
        return (self._manifest, self._refs) if self._manifest and self._manifest.version == self._version else None

    def _has(self, min_version: int) -> bool:
        return self._manifest is not None and self._manifest.version >= min_version

    async def _publish(self, min_version: int) -> None:
        token = uuid.uuid4().hex
        held = asyncio.ensure_future(self.hold_turn(token))
        try:
            await self._publish_now(min_version)
        finally:
            await self.give_turn_back(token)
            await held

    async def _publish_now(self, min_version: int) -> None:
        answer: Any = GroupLost()
        while isinstance(answer, GroupLost):
            async with self._changed:
                # A group that was started again has no such version until it got its state back.
                await self._changed.wait_for(
                    lambda: self._failure or (self._is_complete() and self._versions[0] >= min_version)
                )
                group = self._group
            if group is None:
                return
            command = Command(verb="publish", arguments=(None,), group=group)
            answer = await self.execute(command, _SNAPSHOT_TIMEOUT_S)

    def _is_complete(self) -> bool:
        return len(self._versions) == self._world_size

    def _join(self, rank: int, group: str, version: int) -> None:
        """Note that a rank listens."""
        self._begin(group)
        self._versions[rank] = version
        self._changed.notify_all()

    def _begin(self, group: str) -> None:
        """The first rank of a new group ends the old one."""
        if group != self._group:
            if self._pending is not None:
                self._pending.finished.set()
            if self._group is not None:  # Else it may be this bridge that is new.
                self._saved.clear()
            self._group, self._pending, self._failure = group, None, None
            self._versions.clear()
            # What rank 0 had put into the object store went with it.
            self._manifest, self._refs = None, []
            if self._turns is not None:
                self._turns.begin_group()
            self._changed.notify_all()

    def _order(self, rank: int, group: str) -> Command | None:
        if (command := self._open_command(rank, group)) is not None:
            return command
        if self._turns is not None and group == self._group and self._turns.must_leave(rank):
            return Command(verb="offload", arguments=(None,), group=group)
        return None

    def _open_command(self, rank: int, group: str) -> Command | None:
        pending = self._pending
        if pending is None or self._failure is not None or pending.command.group != group or rank in pending.answers:
            return None
        return pending.command if self._may_come(pending.command) else None

    def _engines_load(self, now: bool) -> None:
        if self._turns is not None:
            self._turns.engines_load = now

    def _may_come(self, command: Command) -> bool:
        """Whether the GPUs are free for a command."""
        if self._turns is None:
            return True
        if command.verb == "send":
            return self._turns.ranks_are_away()
        return command.verb in _WITHOUT_MODELS or self._turns.engines_sleep()

    async def _answers(self, command: Command) -> list[Any] | RankFailure | GroupLost:
        async with self._changed:
            # One that was started again waits until the ranks have found it; those of another group may await a turn.
            await self._changed.wait_for(
                lambda: self._failure or self._is_complete() or self._group not in (None, command.group)
            )
            if self._failure is not None:
                return self._failure
            if self._group != command.group:
                return GroupLost()
            pending = self._pending = _Pending(command=command)
            if command.verb == "save":
                for save_id in self._taken:
                    self._saved.pop(save_id, None)
                self._taken.clear()
            self._engines_load(command.verb == "send")
            self._changed.notify_all()
        try:
            await pending.finished.wait()
        finally:
            async with self._changed:
                self._engines_load(False)
                self._changed.notify_all()
        if self._group != command.group:
            return GroupLost()
        return self._failure or [pending.answers[rank] for rank in range(self._world_size)]


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
