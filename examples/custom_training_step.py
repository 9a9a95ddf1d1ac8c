"""A custom training step: PPO that prefers short completions, composed of the library's own steps.

::

    python examples/custom_training_step.py
    python examples/custom_training_step.py training.iterations=5

``PPO.training_step`` consists of five calls: ``collect`` scored groups, ``make_batch`` of them, ``update`` the policy,
``publish`` it to the replicas, and return the ``result``. A subclass can combine these calls differently. Asynchrony,
checkpoints, evaluation, Ray Tune and fault tolerance keep working. Each call is executed once per iteration, even if
the step is called again after Ctrl-C.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rlhf_ray import PPO, PPOConfig
from rlhf_ray.types import ScoredGroup

TOKEN_COST = 0.02


class BriefPPO(PPO):  # type: ignore[misc, valid-type]
    """Trains on rewards minus a cost per token; reports show the original rewards."""

    def training_step(self) -> dict[str, Any]:
        """Run one iteration and return its result."""
        collected = self.collect()
        costs = [TOKEN_COST * lengths(scored) for scored in collected.groups]
        groups = tuple(
            replace(scored, rewards=scored.rewards - cost) for scored, cost in zip(collected.groups, costs, strict=True)
        )
        self.update(self.make_batch(groups))
        self.publish()
        result: dict[str, Any] = self.result()
        return result | {"brief": {"cost_mean": float(np.mean(costs))}}


def lengths(scored: ScoredGroup) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the number of tokens of each completion in a group."""
    return np.asarray([len(trajectory.token_ids) for trajectory in scored.group.trajectories], dtype=np.float32)


def main(overrides: Sequence[str]) -> None:
    """Train, and print the lengths."""
    algo = BriefPPO(config=PPOConfig().training(iterations=20).apply_overrides(overrides))
    try:
        while algo.iteration < algo.settings.training.iterations:
            result = algo.train()
            tokens = result["rollouts"]["completion_tokens_mean"]
            print(f"{tokens:.2f} tokens per completion, cost {result['brief']['cost_mean']:.3f}", flush=True)
    finally:
        algo.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
