"""What the learner group needs of Ray Train beyond its public API."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup

from rlhf_ray.learner.remote.train_loop import lost_a_peer

__all__ = ["LearnerTrainer", "RestartPolicy", "announce_controller", "announce_placement_groups"]


class LearnerTrainer(TorchTrainer):  # type: ignore[misc]
    """A ``TorchTrainer`` that keeps its workers.

    Ray 2.60 starts an actor that asks the state API every second whether the controller lives, and removes the
    workers' placement group where it does not. It asks whichever cluster of the machine was started last: a second
    one of another user, and a healthy run ends with "worker health check failed". Ray itself removes the group when
    both the controller and the job that it belongs to have ended; for a job of many trials see tune/supervisor.py.

    A worker that dies while the group starts costs a start of the group, as later on. Ray 2.60 ends the run where that
    is not noticed by itself, but in a collective or in the call that begins to train; and what it had started until
    then keeps its CPUs and GPUs, which the next group waits for.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        # The first, since one of the others connects the workers, and may fail.
        return [_EndLeftovers(), *(one for one in callbacks if not isinstance(one, PlacementGroupCleanerCallback))]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        arguments["failure_policy"] = RestartPolicy(self.run_config.failure_config)
        return super()._initialize_and_run_controller(**arguments)


class RestartPolicy(DefaultFailurePolicy):  # type: ignore[misc]
    """Ray Train's own, which also starts the group again when a worker died while it started."""

    def __init__(self, failure_config: Any) -> None:
        super().__init__(failure_config)
        self._deaths = 0

    def _is_retryable_error(self, training_failed_error: Any) -> bool:
        error = getattr(training_failed_error, "controller_failure", None)
        if isinstance(error, RayActorError) or (isinstance(error, BaseException) and lost_a_peer(error)):
            self._deaths += 1
            return bool(self._deaths <= self.failure_config.max_failures)
        return bool(super()._is_retryable_error(training_failed_error))


class _EndLeftovers(WorkerGroupCallback):  # type: ignore[misc]
    """Runs inside the controller: ends what a failed start of the workers left."""

    def __init__(self) -> None:
        self._state: Any = None

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        if self._state is not None:
            self._state.shutdown()

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._state = worker_group.get_worker_group_state()

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        self._state = None


class _AnnounceController(ControllerCallback):  # type: ignore[misc]
    def __init__(self, bridge: Any) -> None:
        self._bridge = bridge
        self._telling: Any = None

    def after_controller_start(self, train_run_context: Any) -> None:
        """Runs inside the controller's own process."""
        controller = ray.get_runtime_context().current_actor
        self._telling = self._bridge.set_controller.remote(controller)
        announce_placement_groups(self._bridge)


def announce_placement_groups(bridge: Any) -> None:
    """Have this process tell ``bridge`` of each placement group before workers start in it.

    Ray Train calls back only when they have: a start that is given up meanwhile would leave the group behind, with its
    CPUs and GPUs, until the whole job has ended.
    """
    create = WorkerGroup._create_placement_group
    telling: list[Any] = []

    def create_and_tell(self: Any, *arguments: Any) -> Any:
        handle = create(self, *arguments)
        telling[:] = [bridge.set_placement_group.remote(handle.placement_group)]
        ray.get(bridge.placement_group.remote())  # Calls of one process begin in their order.
        return handle

    WorkerGroup._create_placement_group = create_and_tell


def announce_controller(bridge: Any) -> ControllerCallback:
    """A Ray Train callback that tells ``bridge`` what aborts a deaf group, and where the workers are."""
    return _AnnounceController(bridge)
