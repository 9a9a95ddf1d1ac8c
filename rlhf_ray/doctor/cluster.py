"""Whether Ray starts here or can be joined, and offers what the settings ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_ray.config.settings import Settings
from rlhf_ray.doctor.check import Check, in_units
from rlhf_ray.doctor.child import ChildFailure, call_in_child
from rlhf_ray.errors import ConfigError

__all__ = ["check_ray", "judge_resources"]

_TIMEOUT_S = 120.0


def check_ray(settings: Settings) -> Check:
    """Start or join Ray in a process of its own and compare its resources with the settings."""
    from rlhf_ray.algorithm.ray_connection import cluster_to_join

    address = settings.resources.ray_address
    joined = cluster_to_join(address)
    try:
        found = call_in_child(_resources, address, timeout_s=_TIMEOUT_S)
    except ChildFailure as failure:
        detail, remedy = f"cannot start: {failure.reason}", f"read {failure.log}"
        if joined is not None:
            detail = f"{joined} cannot be joined: {failure.reason}"
            remedy = (
                "start it there (ray start --head) or correct resources.ray_address (local: one of the run's own); "
                f"{remedy}"
            )
        return Check("Ray", "fail", detail, remedy)
    if isinstance(found, ConfigError):
        return Check("Ray", "fail", f"{found.field} = {found.value}", found.remedy)
    return judge_resources(settings, found, address=joined)


def judge_resources(settings: Settings, found: Mapping[str, Any], *, address: str | None) -> Check:
    """Compare a cluster's resources with those that the settings reserve, and tell the device that the run would use.

    Args:
        settings: The run's settings.
        found: ``ray.cluster_resources()``, and those of each node as ``nodes``.
        address: Where the cluster is; ``None``: started here.
    """
    from rlhf_ray.algorithm.run_plan import Cluster, Placement

    cpus, gpus = found.get("CPU", 0.0), found.get("GPU", 0.0)
    place = "starts here" if address is None else f"joined {address}"
    store = in_units(found.get("object_store_memory", 0.0))
    detail = f"{place}: {cpus:g} CPUs, {gpus:g} GPUs, {store} object store"
    try:
        placement = Placement.of(settings, Cluster(cpus=cpus, gpus=gpus, nodes=tuple(found["nodes"])))
    except ConfigError as error:
        return Check("Ray", "fail", f"{detail}; {error.field} = {error.value!r}", error.remedy)
    if placement.device.on_gpu and placement.device.colocated:
        detail += ", on which replicas and learners take turns (resources.colocate)"
    return Check("Ray", "ok", f"{detail}; {placement}")


def _resources(address: str | None) -> dict[str, Any] | ConfigError:
    import ray

    from rlhf_ray.algorithm.ray_connection import connect

    # As a run does it: without an address Ray joins the cluster on its record, and starts one only where there is none.
    try:
        connect(address, log_to_driver=False)
    except ConfigError as error:
        return error
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    resources = {**ray.cluster_resources(), "nodes": nodes}
    ray.shutdown()
    return resources
