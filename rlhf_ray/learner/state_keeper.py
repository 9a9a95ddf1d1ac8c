"""Beside stage 5: holds copies of the learners' state outside of their processes.

After every update each rank hands its shards to the keeper of its node, where they lie in the object store. A worker
group that Ray Train had to start again takes them from there and goes on after the last update, as if nothing had
happened. What a node takes with it when it dies is gone; then it is a checkpoint that the run goes back to.
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any

from rlhf_ray.worker_env import worker_env

__all__ = ["StateKeeper", "keeper_on"]

# The update that a rank has finished and the Algorithm does not know of yet, and the one before it.
_KEPT = 2


class StateKeeper:
    """The newest states of the ranks of a node."""

    def __init__(self) -> None:
        self._states: defaultdict[int, deque[tuple[int, Any]]] = defaultdict(lambda: deque(maxlen=_KEPT))

    async def keep_state(self, rank: int, version: int, state: Any) -> None:
        """Keep a rank's state after the update that made policy ``version``; large arrays stay in the object store."""
        self._states[rank].append((version, state))

    async def drop_states(self, rank: int) -> None:
        """Let go of a rank's states: it begins another run, whose versions are counted anew."""
        self._states.pop(rank, None)

    async def kept_state(self, rank: int, version: int) -> Any:
        """The rank's state at ``version``, ``None`` where it is not kept."""
        return next((state for kept, state in reversed(self._states[rank]) if kept == version), None)

    async def forget_states(self) -> None:
        """Keep nothing of what was kept until now."""
        self._states.clear()


def keeper_on(node_id: str) -> Any:
    """The keeper of a node: the calling actor on its own node, elsewhere an actor that is started there."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context()
    if here.get_node_id() == node_id:
        return here.current_actor
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    options = {"num_cpus": 0, "scheduling_strategy": there, "max_restarts": -1, "max_task_retries": -1}
    options["runtime_env"] = worker_env()
    return ray.remote(**options)(StateKeeper).remote()
