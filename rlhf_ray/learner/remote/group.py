"""The learner workers as the Algorithm sees them: one Ray Train ``TorchTrainer`` run, driven step by step.

``TorchTrainer.fit()`` runs in a thread for the whole run; commands go through the bridge actor to all ranks and their
answers come back the same way. A worker that dies costs time and nothing else: Ray Train starts all of them again, they
take back the newest state that all have, make the updates since then once more, and then what was asked of them.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import ray
from ray.util import placement_group_table, remove_placement_group

from rlhf_ray.checkpoints.folder import Folder, StoredFile
from rlhf_ray.errors import LearnerError
from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.learner.learner import LearnerSpec
from rlhf_ray.learner.packing import UpdatePlan
from rlhf_ray.learner.remote.bridge import Command, GroupLost, RankFailure, Refusal, bridge_actor
from rlhf_ray.learner.remote.turns import LEARNER_SHARE, Place, check_pairing
from rlhf_ray.learner.remote.update_result import UpdateOrder, UpdateResult, merged_results
from rlhf_ray.stopping import stop_all
from rlhf_ray.types import TraceSpan
from rlhf_ray.weight_sync.manifest import WeightManifest
from rlhf_ray.weight_sync.replica_lost import ReplicaFailure
from rlhf_ray.worker_env import worker_env

__all__ = ["LearnerGroup", "StateLostError", "rank_resources"]

_LOG = logging.getLogger(__name__)
_STOP_TIMEOUT_S = 30.0
# How often a wait looks whether the Ray Train run has ended under it.
_CHECK_S = 1.0
_POLL_S = 0.2
# Updates that can be made again, in intervals of kept states: more is needed only where states cannot be kept.
_REPEATABLE = 8


def rank_resources(spec: LearnerSpec, num_cpus: float) -> dict[str, float]:
    """What Ray reserves per rank."""
    gpus = LEARNER_SHARE if spec.colocated else 1
    return {"CPU": num_cpus} | ({"GPU": gpus} if spec.on_gpu else {})


class StateLostError(LearnerError):
    """The learners were started again and nothing kept their state; :meth:`LearnerGroup.load` comes next."""


class LearnerGroup:
    """Starts, commands and stops the learner ranks.

    Args:
        spec: How each rank builds its models.
        run_id: Names the Ray Train run.
        num_learners: Ranks.
        num_cpus: CPUs reserved a rank.
        storage_path: Folder for Ray Train's own files.
        startup_timeout_s: Longest wait for the ranks to load their models.
        update_timeout_s: Longest wait for one command.
        max_restarts: Times that Ray Train starts the group again.
        state_interval: Updates between states that are kept; 0: none are.
        tensor_parallel_size: Engine workers a replica, for the NCCL group.
        num_replicas: Replicas, which share the learners' GPUs where the spec says so.
    """

    def __init__(
        self,
        *,
        spec: LearnerSpec,
        run_id: str,
        num_learners: int,
        num_cpus: float,
        storage_path: str,
        startup_timeout_s: float,
        update_timeout_s: float,
        max_restarts: int,
        state_interval: int,
        tensor_parallel_size: int,
        num_replicas: int,
    ) -> None:
        self._spec = spec
        self._run_id = run_id
        self.num_learners = num_learners
        self._num_cpus = num_cpus
        self._storage_path = storage_path
        self._startup_timeout_s = startup_timeout_s
        self._update_timeout_s = update_timeout_s
        self._max_restarts = max_restarts
        self._state_interval = state_interval
        self._tensor_parallel_size = tensor_parallel_size
        self._num_replicas = num_replicas
        self._ended = threading.Event()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._name: str | None = None
        self._version = 0
        self._initial_version: int | None = 0
        """Version of ranks that have just started; ``None``: another state was loaded since the start."""
        # What was trained on since the newest state that all ranks keep: the references hold the batches.
        self._since_kept: deque[list[UpdateOrder]] = deque(maxlen=_REPEATABLE * state_interval)
        self._asked_to_keep = 0
        self._saving_version: int | None = None
        self._state_is_lost = False
        self._renewed = False
        self._controller: Any = None
        self._last_command = ""
        self._stopped = False
        # Commands of one thread wait for those of another, and for a group that is started again.
        self._commanding = threading.RLock()
        self.packed = False
        """Whether the learners read packed rows, which depends on their machines and is known when they are ready."""
        self.restarts = 0
        """How often Ray Train started the group again."""
        self.bridge: Any = bridge_actor(num_learners, num_replicas if spec.colocated else 0)

    def start(self) -> None:
        """Begin to start the ranks and return at once; :meth:`wait_ready` waits for them."""
        self._thread = threading.Thread(target=self._fit, name="learner-group", daemon=True)
        self._thread.start()

    def wait_placed(self, stopped: threading.Event) -> None:
        """Wait until every rank has its place, so that replicas, which Serve spreads, leave all ranks one node.

        Returns at once where only one node can hold ranks, and they share no GPU that something else might take; ends
        early when ``stopped`` is set.

        Raises:
            LearnerError: The cluster has no room for them, or they ended.
        """
        name, ends_at = "GPU" if self._spec.on_gpu else "CPU", time.monotonic() + self._startup_timeout_s
        nodes = sum(node["Alive"] and node["Resources"].get(name, 0.0) > 0 for node in ray.nodes())
        if nodes < 2 and not self._spec.colocated:
            return
        while not self._is_placed() and not stopped.wait(_POLL_S):
            if self._ended.is_set():
                raise LearnerError(f"the learners ended before they had started: {self._error!r}") from self._error
            if time.monotonic() > ends_at:
                raise self._late()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Within, engines that share the learners' GPUs sleep; afterward the learners are away, and engines may wake.

        Every command takes the turn by itself; around several ones it changes once.

        Raises:
            LearnerError: Ray Train started the group again too often.
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
            raise self._too_slow("to leave their GPUs")

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
            self._wait_ready()
            if self._spec.colocated and self._spec.on_gpu:
                check_pairing(*self._places())

    def _places(self) -> tuple[dict[str, Place], dict[int, Place]]:
        """Where replicas and learners are, as far as they say so in time."""
        ends_at = time.monotonic() + _STOP_TIMEOUT_S
        while True:
            replicas, ranks = ray.get(self.bridge.places.remote())
            # A bridge that was started a moment ago has not heard of all.
            if time.monotonic() > ends_at or (len(replicas), len(ranks)) >= (self._num_replicas, self.num_learners):
                return replicas, ranks
            time.sleep(_POLL_S)

    def _wait_ready(self) -> None:
        ready = self._await(self.bridge.wait_ready.remote(self._startup_timeout_s, after=self._name), "to start")
        if ready is None:
            raise self._late()
        self._name = ready
        self._controller = ray.get(self.bridge.controller.remote())
        self.packed = all(self._execute("layout", (None,), recalls=False))

    def update(
        self, batch: SequenceBatch, plan: UpdatePlan, *, version: int, update_policy: bool, with_advantages: bool
    ) -> UpdateResult:
        """Train on a batch, after which the policy is ``version``; each rank gets its own sequences by reference.

        Where ranks read slices, neighbors get the same share: Ray Train numbers ranks node by node.

        Args:
            batch: All sequences.
            plan: Which share of the ranks trains on which.
            version: Of the policy afterward.
            update_policy: False in the critic's warm-up.
            with_advantages: Whether the result holds them, in the order of the batch.

        Raises:
            LearnerError: A rank failed, or Ray Train started the group again too often.
            StateLostError: The group was started again, and its state is gone.
        """
        keeps_state = 0 < self._state_interval <= version - self._asked_to_keep
        refs = [ray.put(batch.select(indices)) for indices in plan.sequences]
        size = self._spec.sequence_parallel
        orders = [
            UpdateOrder(
                batch=ref,
                plan=rank,
                version=version,
                update_policy=update_policy,
                with_advantages=with_advantages and place == 0,
                keeps_state=keeps_state,
                spared_version=self._saving_version,
            )
            for ref, rank in zip(refs, plan.ranks, strict=True)
            for place in range(size)
        ]
        result = merged_results(self._execute("update", orders), plan.sequences)
        self._version = version
        self._asked_to_keep = version if keeps_state else self._asked_to_keep
        self._since_kept.append(orders)
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
        published: tuple[WeightManifest, list[Any]] = self._execute("publish", (None,))[0]
        return published

    def stage(self) -> None:
        """In the learners' turn: have ranks copy what :meth:`send` sends in that of the engines."""
        if self._spec.colocated:
            self._execute("stage", (None,))

    def send(self, replica_ids: tuple[str, ...]) -> int | None:
        """Send the policy to the replicas over NCCL or ipc; returns its size in bytes.

        ``None`` where the learners died on the way, perhaps because a replica did, and stand again: whom to send to is
        then to be found out anew.
        """
        argument = (f"{self._run_id}-rollout", "RolloutReplica", self._tensor_parallel_size, replica_ids)
        answers = self._try("send", (argument,), recalls=True)
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
            self._execute("save", (folder,))
            save_id, group, self._saving_version = self._last_command, self._name, self._version

        def wait() -> dict[str, StoredFile]:
            call = self.bridge.wait_saved.remote(save_id, group, self._update_timeout_s)
            try:
                saved = self._await(call, "to write a checkpoint")
            finally:
                self._saving_version = None
            if saved is None:
                raise self._too_slow("to write a checkpoint")
            if isinstance(saved, GroupLost):
                raise LearnerError("the learners were started again while they wrote a checkpoint")
            files: dict[str, StoredFile] = saved
            return files

        return wait

    def load(self, folder: Folder, version: int) -> None:
        """Restore a distributed checkpoint of policy ``version``."""
        self._execute("load", ((folder, version),), recalls=False)
        self._begin_at(version)
        self._initial_version = None

    def renew(self, spec: LearnerSpec) -> None:
        """Begin again with other settings of the same parts: version 0, as after a start."""
        self._spec, self._renewed = spec, True
        self._execute("renew", ((spec, True),), recalls=False)
        self._begin_at(0)
        self._initial_version = 0

    def export(self, folder: str) -> None:
        """Write Hugging Face folders."""
        self._execute("export", (folder,))

    def attend(self) -> None:
        """Give ranks that Ray Train has started again their state back, as the next command would.

        Whoever waits for replicas calls this again and again: a replica that starts asks the learners for its weights,
        and learners without a state have none.

        Raises:
            LearnerError: A rank failed, or Ray Train started the group again too often.
            StateLostError: The group was started again, and its state is gone.
        """
        with self._commanding:
            self._check_state()
            group = self._await(self.bridge.group.remote(), "who they are")
            if group is not None and group != self._name:
                with self.turn():
                    self._recover(recalls=True)

    def stop(self) -> None:
        """End the ranks and the bridge."""
        if self._stopped or not ray.is_initialized():
            return
        self._stopped = True
        stop_all(
            ("learners", self._tell_to_stop),
            ("learners", self._abort_deaf),
            ("the learners' placement group", self._free_placement_group),
            ("calls at the learners' bridge", lambda: ray.get(self.bridge.end_calls.remote(), timeout=_STOP_TIMEOUT_S)),
            ("the learners' bridge", lambda: ray.kill(self.bridge)),
        )

    def _execute(self, verb: str, arguments: Sequence[Any], *, recalls: bool = True) -> list[Any]:
        """Give a command and return the answers of all ranks, whichever group gives them.

        Args:
            verb: What to do.
            arguments: One entry a rank, or a single one for all.
            recalls: Whether a group that was started again must get its state back first.
        """
        with self._commanding, self.turn():
            while (answers := self._try(verb, arguments, recalls=recalls)) is None:
                pass
            return answers

    def _begin_at(self, version: int) -> None:
        """From now on the ranks have another state, of which nothing is known to be kept."""
        self._version, self._asked_to_keep, self._state_is_lost = version, version, False
        self._since_kept.clear()

    def _try(self, verb: str, arguments: Sequence[Any], *, recalls: bool) -> list[Any] | None:
        """As :meth:`_execute`, once: ``None`` where the group was lost, and another one is ready in its place."""
        with self._commanding:
            if recalls:
                self._check_state()
            answers = self._ask(verb, arguments)
            if answers is None:
                with self.turn():
                    self._recover(recalls=recalls)
                return None
            for answer in answers:
                if isinstance(answer, Refusal):
                    if answer.half_done:
                        with self.turn():
                            self._undo()
                    raise LearnerError(f"the learners refuse to {verb}: {answer.message}")
            return answers

    def _ask(self, verb: str, arguments: Sequence[Any]) -> list[Any] | None:
        """Give a command to the group that is there; ``None`` where it was lost."""
        assert self._name is not None, "wait_ready() comes first"
        command = Command(verb=verb, arguments=tuple(arguments), group=self._name)
        self._last_command = command.command_id
        answers = self._await(self.bridge.execute.remote(command, self._update_timeout_s), f"to {verb}")
        if answers is None:
            raise self._too_slow(f"to {verb}")
        return None if isinstance(answers, GroupLost) else list(answers)

    def _too_slow(self, purpose: str) -> LearnerError:
        limit = f"learners.update_timeout_s = {self._update_timeout_s:g} s"
        return LearnerError(f"the learners took longer than {limit} {purpose}")

    def _check_state(self) -> None:
        if self._state_is_lost:
            raise StateLostError("the learners have no state yet: restore a checkpoint first")

    def _recover(self, *, recalls: bool) -> None:
        """Wait for the group that Ray Train has started again, and give it the state after the last update."""
        came_back: bool | None = None
        while came_back is None:
            _LOG.warning("a learner worker died; the learners are started again")
            self.restarts += 1
            self._wait_ready()
            if self._renewed:  # Ray Train starts it with what the first one was started with.
                self._execute("renew", ((self._spec, False),), recalls=False)
            came_back = not recalls or self._come_back(self._initial_version)
        if not came_back:
            self._state_is_lost = True
            # Where a replica took them along, that is the cause.
            told = "".join(f"; {each.told_by}: {each.message}" for each in self.take_replica_failures()[-1:])
            raise StateLostError(f"the learners' state at policy version {self._version} is gone{told}")

    def _undo(self) -> None:
        """After an update that ended between two of its steps: go back to the version before, where it was kept."""
        if self._come_back(None) is None:
            self._recover(recalls=True)

    def _come_back(self, started_at: int | None) -> bool | None:
        """Bring the ranks to the current version: from the newest state that all keep, by the updates since then.

        Args:
            started_at: The version that they have where they keep none; ``None``: they have no version.

        Returns:
            Whether they have it; ``None`` where the group was lost.
        """
        answers = self._ask("recall", (self._version,))
        if answers is None:
            return None
        version = started_at if answers[0] is None else answers[0]
        since = [orders for orders in self._since_kept if version is not None and orders[0].version > version]
        if version is None or (version != self._version and (not since or since[0][0].version != version + 1)):
            return False
        for orders in since:
            _LOG.warning("the update to policy version %d is made once more", orders[0].version)
            again = [replace(order, keeps_state=False, with_advantages=False) for order in orders]
            answers = self._ask("update", again)
            if answers is None:
                return None
            if any(isinstance(answer, Refusal) for answer in answers):
                return False
        return True

    def _await(self, ref: Any, purpose: str) -> Any:
        """Wait for the bridge's answer, or for the end of the Ray Train run, whichever is first."""
        while True:
            done, _ = ray.wait([ref], timeout=_CHECK_S)
            if done:
                answer = ray.get(ref)
                if isinstance(answer, RankFailure):
                    raise LearnerError(f"learner rank {answer.rank} failed {purpose}:\n{answer.message}")
                return answer
            if self._ended.is_set():
                raise LearnerError(f"the learners ended when asked {purpose}: {self._error!r}") from self._error

    def _is_placed(self) -> bool:
        try:
            group = ray.get(self.bridge.placement_group.remote(), timeout=_STOP_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError:  # A bridge that is itself still starting.
            return False
        return group is not None and placement_group_table(group).get("state") == "CREATED"

    def _late(self) -> LearnerError:
        message = f"the learners did not start within learners.startup_timeout_s = {self._startup_timeout_s:g} s"
        if self._is_placed():
            return LearnerError(f"{message}; they have their CPUs and GPUs, and were still loading their models")
        free = ray.available_resources()
        each = f"{self._num_cpus:g} CPUs{' and 1 GPU' if self._spec.on_gpu else ''}"
        return LearnerError(
            f"{message}: the cluster has no room for {self.num_learners} of {each} each; "
            f"{free.get('CPU', 0.0):g} CPUs and {free.get('GPU', 0.0):g} GPUs are free"
        )

    def _fit(self) -> None:
        try:
            self._trainer().fit()
        except BaseException as error:  # kept for the Algorithm's thread, which raises it with its own context
            self._error = error
        finally:
            self._ended.set()

    def _trainer(self) -> Any:
        # Read when fit() begins; without it Ray Train notices a worker's end only seconds later.
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
        from pyarrow.fs import LocalFileSystem
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig

        from rlhf_ray.learner.remote.ray_trainer import LearnerTrainer, announce_controller
        from rlhf_ray.learner.remote.train_loop import train_loop

        return LearnerTrainer(
            train_loop,
            train_loop_config={"spec": self._spec, "bridge": self.bridge},
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if self._spec.on_gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=self.num_learners,
                use_gpu=self._spec.on_gpu,
                resources_per_worker=rank_resources(self._spec, self._num_cpus),
            ),
            run_config=RunConfig(
                name=f"{self._run_id}-learners",
                storage_path=self._storage_path,
                # Or Ray reads the path as a URI, in which #, ? and % have a meaning.
                storage_filesystem=LocalFileSystem(),
                callbacks=[announce_controller(self.bridge)],
                worker_runtime_env=worker_env(),
                failure_config=FailureConfig(max_failures=self._max_restarts),
            ),
        )

    def _tell_to_stop(self) -> None:
        if self._thread is None or not self._thread.is_alive() or self._name is None:
            return
        stop = Command(verb="stop", arguments=(None,), group=self._name)
        try:
            ray.get(self.bridge.execute.remote(stop, _STOP_TIMEOUT_S), timeout=_STOP_TIMEOUT_S)
            self._thread.join(timeout=5.0)
        except ray.exceptions.RayError as error:  # the bridge is gone, and with it the way to the ranks
            _LOG.info("the learners did not take the stop command: %r", error)

    def _abort_deaf(self) -> None:
        """End a group that does not listen: still starting, or stuck in a command."""
        thread, self._thread = self._thread, None
        ends_at = time.monotonic() + _STOP_TIMEOUT_S
        # One that has begun to start a moment ago has no controller yet, and would take CPUs and GPUs later on.
        while thread is not None and thread.is_alive() and time.monotonic() < ends_at:
            controller = self._controller or ray.get(self.bridge.controller.remote(), timeout=_STOP_TIMEOUT_S)
            if controller is not None:
                try:
                    ray.get(controller.abort.remote(), timeout=_STOP_TIMEOUT_S)
                except ray.exceptions.RayActorError:
                    _LOG.debug("the Ray Train controller ended with the abort, as it should")
                except ray.exceptions.GetTimeoutError:  # It waits for CPUs and GPUs, and listens only then.
                    ray.kill(controller)
            thread.join(_STOP_TIMEOUT_S if controller is not None else _POLL_S)

    def _free_placement_group(self) -> None:
        """Ray keeps the group of a controller that was aborted until this process ends."""
        group = ray.get(self.bridge.placement_group.remote(), timeout=_STOP_TIMEOUT_S)
        if group is not None:
            remove_placement_group(group)
