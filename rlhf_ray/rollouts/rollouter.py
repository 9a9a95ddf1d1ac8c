"""The seam of rollouts: how the trajectories of one prompt come about, given replicas and seeds.

The flow (flow.py) decides when a prompt is rolled out, at which policy version and with which sampling settings; a
:class:`Rollouter` decides what happens then. It asks an :class:`Engine` for tokens, once or turn by turn, and never
learns of replicas that die: each request is repeated by the pool (pool.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from rlhf_ray.rollouts.pool import ReplicaPool
from rlhf_ray.rollouts.seeds import Seeds
from rlhf_ray.types import Prompt, RolloutGroup, SamplingSettings

__all__ = ["Engine", "Rollouter", "SingleTurn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """All replicas, as one rollout sees them.

    ``dataclasses.replace`` gives the engine of a later turn: newer weights at least, one sample, fewer tokens.
    """

    pool: ReplicaPool
    sampling: SamplingSettings
    """How tokens are drawn: as in training, greedily for a baseline, or as in evaluation."""
    version: int
    """Oldest policy version that may answer."""

    async def sample(self, prompt: Prompt, *, seed: int) -> RolloutGroup:
        """Sample ``sampling.group_size`` continuations of a prompt; the i-th one's seed is ``seed + i``.

        Raises:
            RolloutError: The prompt is refused, took longer than ``rollouts.timeout_s``, or replicas died at each try.
        """
        return await self.pool.sample(prompt, self.sampling, seed=seed, min_version=self.version)


class Rollouter(Protocol):
    """A kind of rollout; :attr:`rlhf_ray.Algorithm.rollouter` names the one that an algorithm uses."""

    async def rollout(self, prompt: Prompt, engine: Engine, seeds: Seeds) -> RolloutGroup:
        """Roll a prompt out to ``engine.sampling.group_size`` trajectories.

        Called for training, for greedy baselines and for evaluation, many at a time on one event loop; it is cancelled
        when its group is not needed any more. What it draws must follow from its arguments alone, so that a group which
        is rolled out again is the same group.
        """
        ...


class SingleTurn:
    """The completions of a prompt: one request, one turn each."""

    async def rollout(self, prompt: Prompt, engine: Engine, seeds: Seeds) -> RolloutGroup:
        """See :meth:`Rollouter.rollout`."""
        return await engine.sample(prompt, seed=seeds.first_turn)
