"""Holds the files with the state of a node's ranks open, so that they outlive the ranks' processes (kept_state.py).

A worker group that Ray Train had to start again opens them here. What a node takes with it when it dies is gone; then
it is a checkpoint that the run goes back to.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

from rlhf_ray.worker_env import worker_env

__all__ = ["StateKeeper", "keeper_on"]


class StateKeeper:
    """Open files, of the ranks of a node; nothing of what is in them is read here."""

    def __init__(self) -> None:
        self._held: dict[int, list[int]] = {}
        self._replaced: dict[int, asyncio.Event] = {}

    async def stay_held(self, rank: int, paths: list[str]) -> None:
        """As :meth:`hold_state`; open until others take their place, so that Ray repeats it at a keeper that died."""
        await self.hold_state(rank, paths)
        if rank in self._replaced:
            self._replaced[rank].set()
        replaced = self._replaced[rank] = asyncio.Event()
        await replaced.wait()

    async def hold_state(self, rank: int, paths: list[str]) -> None:
        """Hold a rank's files instead of those before; the same ones may be given again."""
        opened = [os.open(path, os.O_RDWR | os.O_CLOEXEC) for path in paths]
        if [os.fstat(one)[1:3] for one in opened] == [os.fstat(one)[1:3] for one in self._held.get(rank, [])]:
            replaced = opened
        else:
            replaced, self._held[rank] = self._held.get(rank, []), opened
        for descriptor in replaced:
            os.close(descriptor)

    async def held_state(self, rank: int) -> list[str]:
        """Where a process of this node may open a rank's files; none where none are held."""
        return [f"/proc/{os.getpid()}/fd/{descriptor}" for descriptor in self._held.get(rank, [])]


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
