"""The Ray Train loop around a learner: waits for commands at the bridge, carries them out, answers.

Consumes ``update``, ``publish``, ``send``, ``save``, ``load``, ``export`` and ``stop``; each rank answers for itself
and the Algorithm is unblocked by the last answer. ``ray.train.report`` is far too slow for a step and is not used.
"""

from __future__ import annotations

import time
import traceback
import uuid
from typing import Any

import ray

from rlhf_ray.learner.bridge import Command, RankFailure
from rlhf_ray.learner.learner import Learner, LearnerSpec
from rlhf_ray.learner.packing import RankPlan
from rlhf_ray.types import Span
from rlhf_ray.weight_sync.manifest import WeightManifest

__all__ = ["train_loop"]

_POLL_S = 30.0


def train_loop(config: dict[str, Any]) -> None:
    """Entry point of one Ray Train worker; ``config`` holds the ``spec`` and the ``bridge`` handle."""
    import ray.train

    rank = ray.train.get_context().get_world_rank()
    bridge = config["bridge"]
    try:
        worker = _Worker(config["spec"], bridge, rank)
        after = ray.get(bridge.register.remote(rank))
        while True:
            command: Command | None = ray.get(bridge.next_command.remote(after, _POLL_S))
            if command is None:
                continue
            after = command.sequence
            if command.verb == "stop":
                ray.get(bridge.answer.remote(after, rank, None))
                return
            started = time.perf_counter()
            result = worker.execute(command.verb, command.argument(rank))
            bridge.answer.remote(after, rank, result)
            if config["spec"].timeline:
                bridge.add_spans.remote(_spans(rank, command.verb, time.perf_counter() - started, result))
    except Exception:
        # The Algorithm must hear the reason at once; Ray Train's own report of it comes seconds later.
        ray.get(bridge.fail.remote(RankFailure(rank=rank, message=traceback.format_exc())))
        raise


def _spans(rank: int, verb: str, seconds: float, result: Any) -> list[Span]:
    """A command that has just ended, and the halves of an update within it."""
    lane = f"learner {rank}"
    whole = Span.ending_now(lane, verb, seconds)
    if verb != "update":
        return [whole]
    middle = whole.end - result["update_s"]
    estimates = Span(lane=lane, name="estimates and advantages", start=middle - result["advantage_s"], end=middle)
    return [whole, estimates, Span(lane=lane, name="optimiser steps", start=middle, end=whole.end)]


class _Worker:
    """Maps a command to the learner's method; knows the version of the policy it holds."""

    def __init__(self, spec: LearnerSpec, bridge: Any, rank: int) -> None:
        self._learner = Learner(spec)
        self._bridge = bridge
        self._rank = rank
        self._version = 0
        self._sender: Any = None
        # The bridge names objects that this process owns; they live as long as these references.
        self._published: list[Any] = []

    def execute(self, verb: str, argument: Any) -> Any:
        """Carry out one command and return this rank's answer."""
        return getattr(self, f"_{verb}")(argument)

    def _update(self, argument: tuple[Any, RankPlan, bool, int]) -> dict[str, float]:
        batch, plan, update_policy, version = argument
        figures = self._learner.update(ray.get(batch), plan, update_policy=update_policy)
        self._version = version
        return figures

    def _publish(self, argument: None) -> tuple[WeightManifest, list[Any]] | None:
        layouts, refs = [], []
        for layout, data in self._learner.weight_buckets():
            layouts.append(layout)
            if data is not None:
                refs.append(ray.put(data))
        if self._rank != 0:
            return None
        manifest = WeightManifest(version=self._version, publication=uuid.uuid4().hex, buckets=tuple(layouts))
        ray.get(self._bridge.set_weights.remote(manifest, refs))
        self._published = refs
        return manifest, refs

    def _send(self, argument: tuple[str, str, int, tuple[str, ...]]) -> int:
        from rlhf_ray.weight_sync.nccl import NcclSender

        app_name, deployment_name, tensor_parallel_size, replica_ids = argument
        source = self._learner.weight_source()
        if self._sender is None:
            self._sender = NcclSender(
                app_name=app_name,
                deployment_name=deployment_name,
                rank=self._rank,
                source=source,
                tensor_parallel_size=tensor_parallel_size,
            )
        self._sender.send(self._version, replica_ids)
        if self._rank == 0:
            ray.get(self._bridge.set_version.remote(self._version))
        return source.size_bytes()

    def _save(self, folder: str) -> None:
        self._learner.save(folder)

    def _load(self, argument: tuple[str, int]) -> None:
        folder, self._version = argument
        self._learner.load(folder)

    def _export(self, folder: str) -> None:
        self._learner.export(folder)
