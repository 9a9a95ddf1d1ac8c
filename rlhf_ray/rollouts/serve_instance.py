"""The one Ray Serve of a cluster: how it is started here, without an HTTP proxy and quietly, and when it is ended."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import ray
from ray import serve
from ray.serve.schema import LoggingConfig

__all__ = ["QUIET", "deploy", "end_unused_serve", "serve_is_running", "start_serve"]

QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
# Algorithms of several threads share it: none may find it half started, or end it while another deploys.
_LOCK = threading.RLock()
# Which one this process started: there is a new one after each new start of Ray.
_started: str | None = None


def serve_is_running() -> bool:
    """Whether any process started it."""
    return _controller() is not None


def start_serve() -> None:
    """Start it, or connect to the one that runs."""
    global _started
    with _LOCK:
        is_new = not serve_is_running()
        serve.start(proxy_location="Disabled", logging_config=QUIET)
        if is_new:
            _started = _controller()


def deploy(make: Callable[[], serve.RunTarget]) -> Any:
    """Begin to deploy an application, and start Serve where it does not run; returns the application's handle.

    Args:
        make: Makes the application, which only one thread at a time can: Serve changes what pickle does meanwhile.
    """
    with _LOCK:
        start_serve()
        # Not serve.run: nothing but the end of the cluster ends its wait.
        (handle,) = serve.run_many(
            [make()], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False
        )
    return handle


def end_unused_serve() -> None:
    """Shut it down if this process started it and no application is left."""
    with _LOCK:
        if _started is not None and _controller() == _started and not serve.status().applications:
            serve.shutdown()


def _controller() -> str | None:
    """Id of the controller actor; ``None``: Serve does not run."""
    try:
        return str(ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")._actor_id.hex())
    except ValueError:
        return None
