"""Around stage 5: what the learner group needs of Ray Train beyond its public API, all of it named here."""

from __future__ import annotations

from typing import Any

import ray
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

__all__ = ["LearnerTrainer", "announce_controller"]


class LearnerTrainer(TorchTrainer):  # type: ignore[misc]
    """A ``TorchTrainer`` whose workers nobody takes away.

    Ray 2.60 starts an actor that asks the state API every second whether the controller lives, and removes the
    workers' placement group where it does not. It asks whichever cluster of the machine was started last: a second
    one, somebody else's, and a healthy run ends with "worker health check failed". Ray itself removes the group when
    both the controller and the job that it belongs to have ended; for a job of many trials see trial_keeper.py.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [one for one in callbacks if not isinstance(one, PlacementGroupCleanerCallback)]


class _AnnounceController(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    def __init__(self, bridge: Any) -> None:
        self._bridge = bridge

    def after_controller_start(self, train_run_context: Any) -> None:
        """Runs inside the controller's own process."""
        controller = ray.get_runtime_context().current_actor
        ray.get(self._bridge.set_controller.remote(controller))

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Runs there too, after each start of the workers."""
        state = worker_group.get_worker_group_state()
        ray.get(self._bridge.set_placement_group.remote(state.placement_group_handle.placement_group))


def announce_controller(bridge: Any) -> ControllerCallback:
    """A Ray Train callback that tells ``bridge`` what aborts a deaf group, and where the workers are."""
    return _AnnounceController(bridge)
