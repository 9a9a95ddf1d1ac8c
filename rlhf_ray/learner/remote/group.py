"""The learner ranks as the Algorithm sees them: commands, and the state of ranks that were restarted.

A request goes through the bridge to all ranks, and their answers come back the same way. A rank that dies costs time
and nothing else: Ray Train restarts all of them (``train_run.py``), they return to the newest state that all have,
repeat the updates since then, and then carry out what was asked of them.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import ray

from rlhf_ray.checkpoints.folder import Folder, StoredFile
from rlhf_ray.errors import LearnerError
from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.learner.learner import LearnerSpec
from rlhf_ray.learner.packing import UpdatePlan
from rlhf_ray.learner.remote.commands import (
    Command,
    ExportCommand,
    GroupLost,
    LayoutCommand,
    LoadCommand,
    PublishCommand,
    RecallCommand,
    Refusal,
    RenewCommand,
    Request,
    SaveCommand,
    SendCommand,
    StageCommand,
    StopCommand,
    UpdateCommand,
    UpdateResult,
    merge_results,
)
from rlhf_ray.learner.remote.train_run import STOP_TIMEOUT_S, TrainRun
from rlhf_ray.learner.remote.turns import Place, check_pairing
from rlhf_ray.stopping import stop_all
from rlhf_ray.types import TraceSpan
from rlhf_ray.weight_sync.manifest import ReplicaFailure, WeightManifest

__all__ = ["LearnerGroup", "StateLostError"]

_LOG = logging.getLogger(__name__)
_CHECK_S = 1.0
_POLL_S = 0.2
# Updates that can be repeated, in intervals of kept states: more is needed only where states cannot be kept.
_REPEATABLE = 8


class StateLostError(LearnerError):
    """The learners were restarted and nothing kept their state; :meth:`LearnerGroup.load` comes next."""


class LearnerGroup(TrainRun):
    """Starts, commands and stops the learner ranks.

    Args:
        update_timeout_s: Longest wait for one command.
        state_interval: Updates between states that are kept; 0: none are.
        tensor_parallel_size: Engine workers per replica, for the NCCL group.
        run: The arguments of :class:`TrainRun`.
    """

    def __init__(
        self, *, update_timeout_s: float, state_interval: int, tensor_parallel_size: int, num_replicas: int, **run: Any
    ) -> None:
        super().__init__(num_replicas=num_replicas, **run)
        self._update_timeout_s = update_timeout_s
        self._state_interval = state_interval
        self._tensor_parallel_size = tensor_parallel_size
        self._num_replicas = num_replicas
        self._name: str | None = None
        self._version = 0
        self._initial_version: int | None = 0
        """Version of ranks that have just started; ``None``: another state was loaded since the start."""
        # What was trained on since the newest state that all ranks keep: the references hold the batches.
        self._since_kept: deque[list[UpdateCommand]] = deque(maxlen=_REPEATABLE * state_interval)
        self._asked_to_keep = 0
        self._saving_version: int | None = None
        self._state_is_lost = False
        self._renewed = False
        self._last_request = ""
        self._stopped = False
        # Commands of one thread wait for those of another, and for a group that is being restarted.
        self._commanding = threading.RLock()
        self.packed = False
        """Whether the learners read packed rows, which depends on their machines and is known when they are ready."""
        self.restarts = 0
        """How often Ray Train restarted the group."""

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Within, engines that share the learners' GPUs sleep; afterward the learners are away, and engines may wake.

        Every command takes the turn by itself; around several ones it changes once.

        Raises:
            LearnerError: Ray Train restarted the group too often.
        """
        if not self._spec.colocated:
            yield
            return
        token = uuid.uuid4().hex
        # Answered when the turn is given back: until then Ray repeats it at a bridge that was started again.
        held = self.bridge.hold_turn.remote(token)
        try:
            yield
        finally:
            with suppress(ray.exceptions.ActorDiedError):  # The run has been stopped.
                ray.get(self.bridge.give_turn_back.remote(token))
                # A bridge that was started again in this moment is asked to hold what it was never given back.
                while not ray.wait([held], timeout=_CHECK_S)[0]:
                    ray.get(self.bridge.give_turn_back.remote(token))
        if self._await(self.bridge.wait_away.remote(self._update_timeout_s), "to leave their GPUs"):
            raise self._command_timeout("to leave their GPUs")

    def replicas_are_placed(self) -> bool:
        """Whether every replica that shares a GPU with a learner has its own, where it waits to build its engine."""
        replicas, _ = ray.get(self.bridge.places.remote())
        return len(replicas) >= self._num_replicas

    def wait_ready(self) -> None:
        """Wait until every rank has loaded its models.

        Raises:
            ConfigError: Replicas and learners are to share GPUs, and were not placed in pairs.
            LearnerError: A rank failed, or the time is over.
        """
        with self.turn():
            self._wait_until_ready()
            if self._spec.colocated and self._spec.on_gpu:
                check_pairing(*self._places())

    def _places(self) -> tuple[dict[str, Place], dict[int, Place]]:
        """Where replicas and learners are, as far as they say so in time."""
        ends_at = time.monotonic() + STOP_TIMEOUT_S
        while True:
            replicas, ranks = ray.get(self.bridge.places.remote())
            # A bridge that was started a moment ago has not heard of all.
            if time.monotonic() > ends_at or (len(replicas), len(ranks)) >= (self._num_replicas, self.num_learners):
                return replicas, ranks
            time.sleep(_POLL_S)

    def _wait_until_ready(self) -> None:
        ready = self._await(self.bridge.wait_ready.remote(self._startup_timeout_s, after=self._name), "to start")
        if ready is None:
            raise self._startup_timeout()
        self._name = ready
        self._controller = ray.get(self.bridge.controller.remote())
        self.packed = all(self._execute(LayoutCommand(), needs_state=False))

    def update(
        self, batch: SequenceBatch, plan: UpdatePlan, *, version: int, update_policy: bool, with_estimates: bool
    ) -> UpdateResult:
        """Train on a batch, after which the policy is ``version``; each rank gets its own sequences by reference.

        Where ranks read slices, neighbors get the same share: Ray Train numbers ranks node by node.

        Args:
            batch: All sequences.
            plan: Which share of the ranks trains on which.
            version: Of the policy afterward.
            update_policy: False in the critic's warm-up.
            with_estimates: Whether the result holds those of tokens, in the order of the batch.

        Raises:
            LearnerError: A rank failed, or Ray Train restarted the group too often.
            StateLostError: The group was restarted, and its state is gone.
        """
        keeps_state = 0 < self._state_interval <= version - self._asked_to_keep
        refs = [ray.put(batch.select(indices)) for indices in plan.sequences]
        size = self._spec.sequence_parallel
        commands = [
            UpdateCommand(
                batch=ref,
                plan=rank,
                version=version,
                update_policy=update_policy,
                with_estimates=with_estimates and place == 0,
                keeps_state=keeps_state,
                spared_version=self._saving_version,
            )
            for ref, rank in zip(refs, plan.ranks, strict=True)
            for place in range(size)
        ]
        result = merge_results(self._execute(*commands), plan.sequences)
        self._version = version
        self._asked_to_keep = version if keeps_state else self._asked_to_keep
        self._since_kept.append(commands)
        if result.kept_version is not None:
            # Where a checkpoint is written of an older one, the next copy overwrites the newer.
            safe = min(
                result.kept_version, result.kept_version if self._saving_version is None else self._saving_version
            )
            while self._since_kept and self._since_kept[0][0].version <= safe:
                self._since_kept.popleft()
        return result

    def publish(self) -> tuple[WeightManifest, list[Any]]:
        """Gather the policy into the object store; returns where it is."""
        published: tuple[WeightManifest, list[Any]] = self._execute(PublishCommand())[0]
        return published

    def stage(self) -> None:
        """In the learners' turn: have ranks copy what :meth:`send` sends in that of the engines."""
        if self._spec.colocated:
            self._execute(StageCommand())

    def send(self, replica_ids: tuple[str, ...]) -> int | None:
        """Send the policy to the replicas over NCCL or ipc; returns its size in bytes.

        ``None`` where the learners died meanwhile, perhaps because a replica did, and are ready again: the caller must
        find out again which replicas there are.
        """
        command = SendCommand(
            app_name=f"{self._run_id}-rollout",
            deployment_name="RolloutReplica",
            tensor_parallel_size=self._tensor_parallel_size,
            replica_ids=replica_ids,
        )
        answers = self._execute_once((command,), needs_state=True)
        return None if answers is None else int(answers[0])

    def take_spans(self) -> list[TraceSpan]:
        """What ranks and replicas did since the last call, where ``reporting.timeline_interval`` asks for it."""
        spans: list[TraceSpan] = ray.get(self.bridge.take_spans.remote())
        return spans

    def take_replica_failures(self) -> list[ReplicaFailure]:
        """Why replicas could not load weights, since the last call."""
        failures: list[ReplicaFailure] = ray.get(self.bridge.take_replica_failures.remote())
        return failures

    def save(self, folder: Folder) -> Callable[[], dict[str, StoredFile]]:
        """Have ranks copy their state, and write a checkpoint of the copy while they carry out what comes next.

        Returns:
            A call that waits for the files and tells what they are; another thread may make it.
        """
        with self._commanding:
            self._execute(SaveCommand(folder=folder))
            save_id, group, self._saving_version = self._last_request, self._name, self._version

        def wait() -> dict[str, StoredFile]:
            call = self.bridge.wait_saved.remote(save_id, group, self._update_timeout_s)
            try:
                saved = self._await(call, "to write a checkpoint")
            finally:
                self._saving_version = None
            if saved is None:
                raise self._command_timeout("to write a checkpoint")
            if isinstance(saved, GroupLost):
                raise LearnerError("the learners were restarted while they wrote a checkpoint")
            files: dict[str, StoredFile] = saved
            return files

        return wait

    def load(self, folder: Folder, version: int) -> None:
        """Restore a distributed checkpoint of policy ``version``."""
        self._execute(LoadCommand(folder=folder, version=version), needs_state=False)
        self._reset_to(version)
        self._initial_version = None

    def renew(self, spec: LearnerSpec) -> None:
        """Begin again with other settings of the same parts: version 0, as after a start."""
        self._spec, self._renewed = spec, True
        self._execute(RenewCommand(spec=spec, begins=True), needs_state=False)
        self._reset_to(0)
        self._initial_version = 0

    def export(self, folder: str) -> None:
        """Write Hugging Face folders."""
        self._execute(ExportCommand(folder=folder))

    def restore_restarted_ranks(self) -> None:
        """Restore the state of ranks that Ray Train has restarted, as the next command would.

        To be called again and again while replicas are waited for: one that starts asks the learners for its weights,
        and learners without a state have none.

        Raises:
            LearnerError: A rank failed, or Ray Train restarted the group too often.
            StateLostError: The group was restarted, and its state is gone.
        """
        with self._commanding:
            self._check_state()
            group = self._await(self.bridge.group.remote(), "who they are")
            if group is not None and group != self._name:
                with self.turn():
                    self._recover(needs_state=True)

    def stop(self) -> None:
        """End the ranks and the bridge."""
        if self._stopped or not ray.is_initialized():
            return
        self._stopped = True
        stop_all(
            ("learners", self._send_stop),
            ("learners", self._abort_unresponsive),
            ("the learners' placement group", self._free_placement_group),
            ("calls at the learners' bridge", lambda: ray.get(self.bridge.end_calls.remote(), timeout=STOP_TIMEOUT_S)),
            ("the learners' bridge", lambda: ray.kill(self.bridge)),
        )

    def _execute(self, *commands: Command, needs_state: bool = True) -> list[Any]:
        """Have all ranks carry out a command and return their answers, whichever group gives them.

        Args:
            commands: One per rank, or a single one for all.
            needs_state: Whether a group that was restarted must have its state restored first.
        """
        with self._commanding, self.turn():
            while (answers := self._execute_once(commands, needs_state=needs_state)) is None:
                pass
            return answers

    def _reset_to(self, version: int) -> None:
        """From now on the ranks have another state, of which nothing is known to be kept."""
        self._version, self._asked_to_keep, self._state_is_lost = version, version, False
        self._since_kept.clear()

    def _execute_once(self, commands: Sequence[Command], *, needs_state: bool) -> list[Any] | None:
        """As :meth:`_execute`, once: ``None`` where the group was lost, and another one is ready in its place."""
        with self._commanding:
            if needs_state:
                self._check_state()
            answers = self._request(commands)
            if answers is None:
                with self.turn():
                    self._recover(needs_state=needs_state)
                return None
            for answer in answers:
                if isinstance(answer, Refusal):
                    if answer.partly_updated:
                        with self.turn():
                            self._undo_partial_update()
                    raise LearnerError(f"the learners refuse to {commands[0].name}: {answer.message}")
            return answers

    def _request(self, commands: Sequence[Command]) -> list[Any] | None:
        """Ask the group that is there; ``None`` where it was lost."""
        assert self._name is not None, "wait_ready() comes first"
        request = Request(commands=tuple(commands), group=self._name)
        self._last_request, purpose = request.request_id, f"to {commands[0].name}"
        answers = self._await(self.bridge.execute.remote(request, self._update_timeout_s), purpose)
        if answers is None:
            raise self._command_timeout(purpose)
        return None if isinstance(answers, GroupLost) else list(answers)

    def _command_timeout(self, purpose: str) -> LearnerError:
        limit = f"learners.update_timeout_s = {self._update_timeout_s:g} s"
        return LearnerError(f"the learners took longer than {limit} {purpose}")

    def _check_state(self) -> None:
        if self._state_is_lost:
            raise StateLostError("the learners have no state yet: restore a checkpoint first")

    def _recover(self, *, needs_state: bool) -> None:
        """Wait for the group that Ray Train has restarted, and restore the state after the last update."""
        restored: bool | None = None
        while restored is None:
            _LOG.warning("a learner worker died; the learners are restarted")
            self.restarts += 1
            self._wait_until_ready()
            if self._renewed:  # Ray Train starts it with what the first one was started with.
                self._execute(RenewCommand(spec=self._spec, begins=False), needs_state=False)
            restored = not needs_state or self._restore_version(self._initial_version)
        if not restored:
            self._state_is_lost = True
            # Where a replica took them along, that is the cause.
            causes = "".join(f"; {each.told_by}: {each.message}" for each in self.take_replica_failures()[-1:])
            raise StateLostError(f"the learners' state at policy version {self._version} is gone{causes}")

    def _undo_partial_update(self) -> None:
        """After an update that ended between two of its steps: return to the version before, where it was kept."""
        if self._restore_version(None) is None:
            self._recover(needs_state=True)

    def _restore_version(self, started_at: int | None) -> bool | None:
        """Bring the ranks to the current version: from the newest state that all keep, by repeating the updates since.

        Args:
            started_at: The version that they have where they keep none; ``None``: they have no version.

        Returns:
            Whether they have it; ``None`` where the group was lost.
        """
        answers = self._request((RecallCommand(version=self._version),))
        if answers is None:
            return None
        version = started_at if answers[0] is None else answers[0]
        since = [commands for commands in self._since_kept if version is not None and commands[0].version > version]
        if version is None or (version != self._version and (not since or since[0][0].version != version + 1)):
            return False
        for commands in since:
            _LOG.warning("the update to policy version %d is repeated", commands[0].version)
            repeated = [replace(command, keeps_state=False, with_estimates=False) for command in commands]
            answers = self._request(repeated)
            if answers is None:
                return None
            if any(isinstance(answer, Refusal) for answer in answers):
                return False
        return True

    def _send_stop(self) -> None:
        if self._thread is None or not self._thread.is_alive() or self._name is None:
            return
        stop = Request(commands=(StopCommand(),), group=self._name)
        try:
            ray.get(self.bridge.execute.remote(stop, STOP_TIMEOUT_S), timeout=STOP_TIMEOUT_S)
            self._thread.join(timeout=5.0)
        except ray.exceptions.RayError as error:  # the bridge is gone, and with it the way to the ranks
            _LOG.info("the learners did not take the stop command: %r", error)
