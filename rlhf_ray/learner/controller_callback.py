"""Tells the bridge which actor is the Ray Train controller, so that a group that does not listen can be aborted."""

from __future__ import annotations

from typing import Any

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback

__all__ = ["announce_controller"]


class _AnnounceController(ControllerCallback):  # type: ignore[misc]
    def __init__(self, bridge: Any) -> None:
        self._bridge = bridge

    def after_controller_start(self, train_run_context: Any) -> None:
        """Runs inside the controller's own process."""
        controller = ray.get_runtime_context().current_actor
        ray.get(self._bridge.set_controller.remote(controller))


def announce_controller(bridge: Any) -> ControllerCallback:
    """A Ray Train callback that hands the controller's handle to ``bridge``."""
    return _AnnounceController(bridge)
