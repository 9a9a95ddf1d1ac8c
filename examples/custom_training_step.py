"""A training step of your own: PPO that prefers short completions, made of the calls of the library's own step.

::

    python examples/custom_training_step.py
    python examples/custom_training_step.py training.iterations=5

``PPO.training_step`` is five calls: ``collect`` a batch of scored groups, ``make_batch`` of it, ``update`` the policy,
``publish`` it to the replicas, and the ``result``. A subclass writes its own from them, and keeps the rest: asynchrony,
checkpoints, evaluation, Ray Tune, and what happens where a process dies. Each call is done once per iteration, and
knows it where the step is called again after Ctrl-C.
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
    """Trains on rewards less a cost per token; reports show the rewards as the functions gave them."""

    def training_step(self) -> dict[str, Any]:
        """One iteration; returns its result."""
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
    """Tokens of each completion of a group."""
    return np.asarray([len(trajectory.token_ids) for trajectory in scored.group.trajectories], dtype=np.float32)


def main(overrides: Sequence[str]) -> None:
    """Train, and show what became of the lengths."""
    algo = BriefPPO(config=PPOConfig().training(iterations=20).apply_overrides(overrides))
    try:
        while algo.iteration < algo.settings.training.iterations:
            result = algo.train()
            tokens = result["rollouts"]["completion_tokens_mean"]
            print(f"{tokens:.2f} tokens per completion, which cost {result['brief']['cost_mean']:.3f}", flush=True)
    finally:
        algo.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
