"""A run's connection to a Ray cluster, and its place there."""

from __future__ import annotations

import logging
from typing import Any

from rlhf_ray.algorithm.ray_connection import RayConnection
from rlhf_ray.algorithm.run_plan import Cluster, Placement
from rlhf_ray.config.settings import Settings
from rlhf_ray.stopping import stop_all

__all__ = ["RaySession"]

_LOG = logging.getLogger(__name__)
# Of all sessions in this process.
_CONNECTION = RayConnection()


class RaySession:
    """Joins or starts a cluster and places the run there; ends only what it started.

    Args:
        settings: The run's settings: address, device and log level.

    Raises:
        ConfigError: The run does not fit the cluster.
    """

    def __init__(self, settings: Settings) -> None:
        level = settings.debugging.log_level
        _CONNECTION.join(
            self,
            settings.resources.ray_address,
            namespace="rlhf_ray",
            log_to_driver=settings.debugging.log_to_driver,
            logging_level=logging.getLevelName(level),
            configure_logging=True,
        )
        self.ends_ray = _CONNECTION.ends_ray
        """Whether the whole cluster ends with the last session of this process: one of them started it."""
        for name in ("ray.serve", "ray.data", "ray.train"):
            logging.getLogger(name).setLevel(level)
        try:
            cluster = Cluster.joined()
            self.placement = self._placed(settings, cluster)
            device = self.placement.device
            unexpected = cluster.gpus > 0 and not device.on_gpu and settings.resources.device == "auto"
            _LOG.log(logging.WARNING if unexpected else logging.INFO, "the run uses %s", device)
        except BaseException:
            self.stop()  # Or the next session here would take this cluster for the user's.
            raise

    def stop(self) -> None:
        """Leave the cluster; one that was started here ends with the last session."""
        stop_all(("Ray", lambda: _CONNECTION.leave(self)))

    def begun(self, app_name: str, bridge: Any) -> None:
        """Parts are about to start: the Serve application and the learners, which ``bridge`` knows."""

    def started(self) -> None:
        """All parts run."""

    def _placed(self, settings: Settings, cluster: Cluster) -> Placement:
        return Placement.of(settings, cluster)
