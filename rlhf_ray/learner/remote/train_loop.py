"""The Ray Train loop around a learner: waits for commands (``commands.py``) at the bridge, carries them out, answers.

Each rank answers for itself, and the Algorithm is unblocked by the last answer. ``ray.train.report`` is far too slow
for a step and is not used.

Where replicas share the ranks' GPUs a rank waits for the learners' turn before it builds its models, moves them to host
memory when it is told to (``OffloadCommand``, which has no answer), and brings them back for the next command.
"""

from __future__ import annotations

import gc
import logging
import shutil
import tempfile
import threading
import time
import traceback
import uuid
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist

from rlhf_ray.checkpoints.folder import Folder, StoredFile
from rlhf_ray.errors import LearnerError
from rlhf_ray.learner.kept_state import KeptState
from rlhf_ray.learner.learner import Learner, LearnerSpec
from rlhf_ray.learner.remote.commands import (
    Command,
    ExportCommand,
    LayoutCommand,
    LoadCommand,
    OffloadCommand,
    PublishCommand,
    RankFailure,
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
)
from rlhf_ray.learner.remote.turns import Place
from rlhf_ray.types import TraceSpan
from rlhf_ray.weight_sync.manifest import ReplicaFailure, ReplicaLostError, WeightManifest

__all__ = ["lost_a_peer", "train_loop"]

_LOG = logging.getLogger(__name__)
_POLL_S = 30.0
_TELL_TIMEOUT_S = 10.0
_HOLD_AGAIN_S = 0.5


def train_loop(config: dict[str, Any]) -> None:
    """Entry point of one Ray Train worker; ``config`` holds the ``spec`` and the ``bridge`` handle."""
    import ray.train

    rank = ray.train.get_context().get_world_rank()
    spec, bridge = config["spec"], config["bridge"]
    try:
        group = _name_of_group()
        place = _wait_turn(bridge, rank, group) if spec.colocated else None
        _serve(_Worker(spec, bridge, rank), bridge, rank, group, place=place, timeline=spec.timeline)
    except Exception as error:
        # Ray Train ends the process group before it ends the workers.
        if not lost_a_peer(error) and dist.is_initialized():
            # The Algorithm must hear the reason at once; Ray Train's own report of it comes seconds later.
            ray.get(bridge.fail.remote(RankFailure(rank=rank, message=traceback.format_exc())))
        raise


def _wait_turn(bridge: Any, rank: int, group: str) -> Place:
    """Wait until the engines on the ranks' GPUs sleep; returns where this rank is."""
    context = ray.get_runtime_context()
    place = context.get_node_id(), ",".join(context.get_accelerator_ids().get("GPU", ()))
    while not ray.get(bridge.wait_turn.remote(rank, group, place, _POLL_S)):
        pass
    return place


def _serve(worker: _Worker, bridge: Any, rank: int, group: str, *, place: Place | None = None, timeline: bool) -> None:
    # By kind: a replica that starts may have had weights published before the Algorithm's request is repeated.
    answered: dict[type[Command], tuple[str, Any]] = {}
    while True:
        request: Request | None = ray.get(
            bridge.next_command.remote(rank, group, worker.version, _POLL_S, worker.is_resident, place)
        )
        if request is None:
            continue
        command = request.command(rank)
        if isinstance(command, OffloadCommand):
            worker.offload()
            continue
        if isinstance(command, StopCommand):
            worker.finish()
            ray.get(bridge.answer.remote(request.request_id, rank, None))
            return
        started = time.perf_counter()
        known, result = answered.get(type(command), ("", None))
        repeated = known == request.request_id  # The bridge was restarted and lost the answer.
        if not repeated:
            try:
                result = worker.execute(command, request.request_id)
            except LearnerError as error:  # Every rank raises it alike; only what is unforeseen ends them.
                result = Refusal(str(error), partly_updated=worker.is_partly_updated)
            answered[type(command)] = request.request_id, result
        bridge.answer.remote(request.request_id, rank, result)
        if not isinstance(command, UpdateCommand):  # What an update has made is copied when engines have it.
            worker.begin_to_keep()
        if timeline and not repeated and not isinstance(result, Refusal):
            bridge.add_spans.remote(_spans(rank, command.name, time.perf_counter() - started, result))


def _name_of_group() -> str:
    """A name for this start of the worker group, the same on all ranks."""
    names = [uuid.uuid4().hex]
    dist.broadcast_object_list(names, src=0)
    return names[0]


def lost_a_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank, or a replica, died: Ray Train starts the group again."""
    # gloo has no type of its own for that; its messages begin with its source file.
    return isinstance(error, (dist.DistError, ReplicaLostError)) or "gloo/transport" in str(error)


def _spans(rank: int, name: str, seconds: float, result: Any) -> list[TraceSpan]:
    """A command that has just ended, and the halves of an update within it."""
    lane = f"learner {rank}"
    whole = TraceSpan.ending_now(lane, name, seconds)
    if not isinstance(result, UpdateResult):
        return [whole]
    middle = whole.end - result.metrics["update_s"]
    start = middle - result.metrics["advantage_s"]
    estimates = TraceSpan(lane=lane, name="estimates and advantages", start=start, end=middle)
    return [whole, estimates, TraceSpan(lane=lane, name="optimizer steps", start=middle, end=whole.end)]


class _Worker:
    """Carries out commands with a learner."""

    def __init__(self, spec: LearnerSpec, bridge: Any, rank: int) -> None:
        self._bridge = bridge
        self._rank = rank
        self._spec = spec
        self._keeps_state = spec.keeps_state
        # Where engines wait for this GPU, copies are made of what has left it.
        self._kept = KeptState(2 if spec.keeps_state else 1, deferred=spec.colocated)
        self._to_keep: tuple[int, int | None] | None = None
        """Version of the state that is to be kept, and one that is spared."""
        self._held: list[str] = []
        self._telling: Any = None
        if spec.keeps_state:
            self._adopt_state()
        self._learner = Learner(spec, self._kept)
        self.version = 0
        """Of the policy that this rank holds."""
        self._updated: tuple[int, UpdateResult] | None = None
        self._broken_off: str | None = None
        """Why weights are those of no version: an update ended after some of its steps."""
        self._sender: Any = None
        self._staged_version: int | None = None
        # The bridge names objects that this process owns; they live as long as these references.
        self._published: list[Any] = []

    @property
    def is_resident(self) -> bool:
        """Whether the models are where they compute."""
        return not self._learner.is_offloaded

    def offload(self) -> None:
        """Leave the GPU to an engine, and copy what is to be kept from host memory."""
        self.begin_to_keep()
        self._learner.offload()

    def finish(self) -> None:
        """Make the copies that wait for :meth:`offload`, which does not come any more."""
        self._kept.wait()

    def execute(self, command: Command, request_id: str) -> Any:
        """Carry out one command and return this rank's answer."""
        if not command.publishes:
            self.begin_to_keep()
        if self._broken_off is not None and command.reads_weights:
            raise LearnerError(self._broken_off)
        if command.needs_models and not isinstance(command, RenewCommand) and self._learner.is_offloaded:
            self._learner.onload()
        match command:
            case LayoutCommand():
                return self._learner.packed
            case UpdateCommand():
                return self._update(command)
            case PublishCommand():
                return self._publish()
            case StageCommand():
                self._learner.stage_weights()
                self._staged_version = self.version
            case SendCommand():
                return self._send(command)
            case SaveCommand():
                self._save(command.folder, request_id)
            case LoadCommand():
                self._load(command.folder, command.version)
            case RecallCommand():
                return self._recall(command.version)
            case RenewCommand():
                self._renew(command.spec, begins=command.begins)
            case ExportCommand():
                self._learner.export(command.folder)
            case _:
                raise NotImplementedError(command.name)
        return None

    @property
    def is_partly_updated(self) -> bool:
        """Whether weights are those of no version."""
        return self._broken_off is not None

    def _update(self, command: UpdateCommand) -> UpdateResult:
        version = command.version
        if self._updated is not None and self._updated[0] == version == self.version:
            # The caller did not wait for the answer (Ctrl-C in a notebook, a time limit), and asks again.
            return self._updated[1]
        steps_before = self._learner.steps_taken
        try:
            metrics = self._learner.update(
                ray.get(command.batch),
                command.plan,
                update_policy=command.update_policy,
                keep_estimates=command.with_estimates,
            )
        except LearnerError as error:
            message = f"policy version {version}: {error}"
            if self._learner.steps_taken != steps_before:
                self._broken_off = f"{message} (its first steps were not undone: restore a checkpoint, or start again)"
            raise LearnerError(message) from error
        self.version = version
        if command.keeps_state:
            self._to_keep = version, command.spared_version
        result = UpdateResult(
            metrics=metrics,
            estimates=self._learner.token_estimates,
            kept_version=max(self._kept.versions, default=None),
        )
        self._updated = version, result
        return result

    def _publish(self) -> tuple[WeightManifest, list[Any]] | None:
        layouts, refs = [], []
        for layout, pieces in self._learner.weight_buckets():
            layouts.append(layout)
            if pieces is not None:
                refs.append(ray.put(pieces))  # The one copy that is made: pieces may be the learner's own memory.
        if self._rank != 0:
            return None
        manifest = WeightManifest(version=self.version, publication=uuid.uuid4().hex, buckets=tuple(layouts))
        ray.get(self._bridge.set_weights.remote(manifest, refs))
        self._published = refs
        return manifest, refs

    def _send(self, command: SendCommand) -> int:
        # Here, since it imports vLLM.
        from rlhf_ray.weight_sync.ipc import IpcSender
        from rlhf_ray.weight_sync.nccl import NcclSender

        if self._spec.colocated and self._staged_version != self.version:
            raise LearnerError(f"policy version {self.version} was not staged before its models left the GPU")
        source = self._learner.weight_source()
        if self._sender is None:
            sender_class = IpcSender if self._spec.weight_transfer == "ipc" else NcclSender
            self._sender = sender_class(
                app_name=command.app_name,
                deployment_name=command.deployment_name,
                rank=self._rank,
                source=source,
                tensor_parallel_size=command.tensor_parallel_size,
                tell=self._tell_stuck,
            )
        self._sender.send(self.version, command.replica_ids)
        if self._rank == 0:
            ray.get(self._bridge.set_version.remote(self.version))
        return source.size_bytes()

    def _tell_stuck(self, message: str) -> None:
        failure = ReplicaFailure(told_by="learner rank 0", message=message, is_new=False)
        ray.get(self._bridge.replica_failed.remote(failure), timeout=_TELL_TIMEOUT_S)

    def _save(self, folder: Folder, save_id: str) -> None:
        """Begin to copy what is to be saved; the rest is done while the commands that come next are carried out."""
        here = folder.local or Path(tempfile.mkdtemp(prefix="rlhf-ray-checkpoint-"))
        here.mkdir(parents=True, exist_ok=True)
        written = self._learner.save(str(here), self.version)
        self._hold_state()
        finish = threading.Thread(target=self._finish_save, args=(folder, here, save_id, written), name="checkpoint")
        finish.start()

    def _finish_save(self, folder: Folder, here: Path, save_id: str, written: Future[Any]) -> None:
        try:
            written.result()
            files = sorted(here.glob(f"shard-{self._rank + 1:05d}-*"))
            if folder.local is None:
                for file in files:
                    folder.upload(file)
            answer: Any = {file.name: StoredFile.of(file) for file in files}
        except Exception:  # Training continues; the driver reports it.
            answer = RankFailure(rank=self._rank, message=traceback.format_exc())
        finally:
            if folder.local is None:
                shutil.rmtree(here, ignore_errors=True)
        self._telling = self._bridge.saved.remote(save_id, self._rank, answer)

    def _load(self, folder: Folder, version: int) -> None:
        if folder.local is not None:
            self._learner.load(str(folder.local))
        else:
            with tempfile.TemporaryDirectory(prefix="rlhf-ray-checkpoint-", ignore_cleanup_errors=True) as here:
                for name in folder.files():
                    folder.download(name, Path(here) / name)
                self._learner.load(here)
        self._kept.forget()
        self.version, self._broken_off = version, None
        if self._keeps_state:  # At once: the checkpoint may be gone by the time that a rank dies.
            self._to_keep = version, None
            self.begin_to_keep()
            self._learner.wait_copied()

    def _recall(self, version: int) -> int | None:
        """Return to the newest state up to ``version`` that all ranks have; tells which."""
        found: list[Any] = [None] * dist.get_world_size()
        # Without kept states there is at most one that a checkpoint is being written of, and freed then.
        dist.all_gather_object(found, self._kept.versions if self._keeps_state else [])
        common = set.intersection(*map(set, found))
        newest = max((kept for kept in common if kept <= version), default=None)
        if newest is not None:
            self._learner.recall(newest)
            self.version, self._broken_off, self._updated = newest, None, None
        return newest

    def _adopt_state(self) -> None:
        try:
            self._kept.adopt(ray.get(ray.get(self._reach_keeper()).held_state.remote(self._rank)))
        except (OSError, ray.exceptions.RayError) as error:
            _LOG.warning("the state that was kept of rank %d cannot be read: %r", self._rank, error)
        self._hold_state()

    def begin_to_keep(self) -> None:
        """Begin to copy the state that an update has asked for, if there is one."""
        if self._to_keep is None:
            return
        (version, spared), self._to_keep = self._to_keep, None
        try:
            self._learner.keep_state(version, spare=spared)
        except OSError as error:
            _LOG.warning("the state of rank %d is not kept: %r", self._rank, error)
        self._hold_state()

    def _hold_state(self) -> None:
        if self._keeps_state and (paths := self._kept.paths()) != self._held:
            self._held = paths
            threading.Thread(target=self._stay_held, args=(paths,), name="hold-state", daemon=True).start()

    def _stay_held(self, paths: list[str]) -> None:
        """Have this node's keeper hold the files, and the one after it: on another node it ends with the bridge."""
        while True:
            try:
                keeper = ray.get(self._reach_keeper())
                try:
                    ray.get(keeper.stay_held.remote(self._rank, paths))
                    return
                except ray.exceptions.RayActorError:
                    time.sleep(_HOLD_AGAIN_S)
            except ray.exceptions.ActorDiedError:
                _LOG.info("the run has ended")
                return
            except ray.exceptions.RayError as error:
                _LOG.warning("the learners' state is not kept any more: %r", error)
                return

    def _reach_keeper(self) -> Any:
        return self._bridge.keeper.remote(ray.get_runtime_context().get_node_id())

    def _renew(self, spec: LearnerSpec, *, begins: bool) -> None:
        """Build the models again, when nothing of those before is left: both at once may not fit.

        Ranks that were restarted are brought to the same settings, and return to what was kept under them.
        """
        self._published.clear()
        self._updated = None
        self._to_keep = self._staged_version = None
        if self._sender is not None:  # It reads the weights of the learner before.
            self._sender.close()
            self._sender = None
        self._learner.close()
        del self._learner
        gc.collect()  # Hooks of FSDP and the model that they are on refer to each other.
        if spec.on_gpu:
            torch.cuda.empty_cache()
        if begins:
            self._kept.forget()
        self._learner = Learner(spec, self._kept)
        self.version, self._broken_off = 0, None
