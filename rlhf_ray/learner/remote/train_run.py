"""The Ray Train run of the learner ranks: how it starts, is waited for and ends.

``TorchTrainer.fit()`` runs in a thread for the whole run, and Ray Train restarts all workers when one dies. What the
ranks are told to do is in ``group.py``.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any

import ray
from ray.util import placement_group_table, remove_placement_group

from rlhf_ray.errors import LearnerError
from rlhf_ray.learner.learner import LearnerSpec
from rlhf_ray.learner.remote.bridge import bridge_actor
from rlhf_ray.learner.remote.commands import RankFailure
from rlhf_ray.learner.remote.turns import LEARNER_SHARE
from rlhf_ray.worker_env import worker_env

__all__ = ["STOP_TIMEOUT_S", "TrainRun", "rank_resources"]

_LOG = logging.getLogger(__name__)
STOP_TIMEOUT_S = 30.0
"""Longest wait for one step of an end."""
# How often a wait looks whether the Ray Train run has ended meanwhile.
_CHECK_S = 1.0
_POLL_S = 0.2


def rank_resources(spec: LearnerSpec, num_cpus: float) -> dict[str, float]:
    """What Ray reserves per rank."""
    gpus = LEARNER_SHARE if spec.colocated else 1
    return {"CPU": num_cpus} | ({"GPU": gpus} if spec.on_gpu else {})


class TrainRun:
    """One run of Ray Train, which holds the learner ranks and the bridge to them.

    Args:
        spec: How each rank builds its models.
        run_id: Names the Ray Train run.
        num_learners: Ranks.
        num_cpus: CPUs reserved per rank.
        storage_path: Folder for Ray Train's own files.
        startup_timeout_s: Longest wait for the ranks to load their models.
        max_restarts: Times that Ray Train restarts the ranks.
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
        max_restarts: int,
        num_replicas: int,
    ) -> None:
        self._spec = spec
        self._run_id = run_id
        self.num_learners = num_learners
        self._num_cpus = num_cpus
        self._storage_path = storage_path
        self._startup_timeout_s = startup_timeout_s
        self._max_restarts = max_restarts
        self._ended = threading.Event()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._controller: Any = None
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
                raise self._startup_timeout()

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
            group = ray.get(self.bridge.placement_group.remote(), timeout=STOP_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError:  # A bridge that is itself still starting.
            return False
        return group is not None and placement_group_table(group).get("state") == "CREATED"

    def _startup_timeout(self) -> LearnerError:
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

    def _abort_unresponsive(self) -> None:
        """End a group that does not listen: still starting, or stuck in a command."""
        thread, self._thread = self._thread, None
        ends_at = time.monotonic() + STOP_TIMEOUT_S
        # One that has begun to start a moment ago has no controller yet, and would take CPUs and GPUs later on.
        while thread is not None and thread.is_alive() and time.monotonic() < ends_at:
            controller = self._controller or ray.get(self.bridge.controller.remote(), timeout=STOP_TIMEOUT_S)
            if controller is not None:
                try:
                    ray.get(controller.abort.remote(), timeout=STOP_TIMEOUT_S)
                except ray.exceptions.RayActorError:
                    _LOG.debug("the Ray Train controller ended with the abort, as it should")
                except ray.exceptions.GetTimeoutError:  # It waits for CPUs and GPUs, and listens only then.
                    ray.kill(controller)
            thread.join(STOP_TIMEOUT_S if controller is not None else _POLL_S)

    def _free_placement_group(self) -> None:
        """Ray keeps the group of a controller that was aborted until this process ends."""
        group = ray.get(self.bridge.placement_group.remote(), timeout=STOP_TIMEOUT_S)
        if group is not None:
            remove_placement_group(group)
