"""The environment that Ray workers are started with: each sees the GPUs that it has reserved, and no other."""

from __future__ import annotations

from typing import Any

__all__ = ["worker_env"]


def worker_env(**env_vars: str) -> dict[str, Any]:
    """The ``runtime_env`` of an actor or a task, with these variables, and with the GPUs hidden that are not its own.

    Ray 2.60 leaves all GPUs visible to a worker that reserves none (``set_visible_accelerator_ids`` in
    ray/_private/utils.py): each of them that touches CUDA would take memory of GPU 0. On a cluster without GPUs there
    is nothing to hide, and a worker with an environment of its own cannot use a process that Ray has started ahead.
    """
    import ray

    if ray.cluster_resources().get("GPU"):
        env_vars["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "1"
    return {"env_vars": env_vars} if env_vars else {}
