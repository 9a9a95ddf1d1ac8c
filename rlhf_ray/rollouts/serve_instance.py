"""The one Ray Serve of a cluster: whether it runs, and how it is started here, without an HTTP proxy and quietly."""

from __future__ import annotations

import ray
from ray import serve
from ray.serve.schema import LoggingConfig

__all__ = ["QUIET", "serve_is_running", "start_serve"]

QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)


def serve_is_running() -> bool:
    """Whether somebody started it."""
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return False
    return True


def start_serve() -> None:
    """Start it, or connect to the one that runs."""
    serve.start(proxy_location="Disabled", logging_config=QUIET)
