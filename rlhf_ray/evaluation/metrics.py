"""Scored groups of one held-out set -> its metrics; keys are declared in reporting/metrics.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rlhf_ray.evaluation.pass_at_k import pass_at_k
from rlhf_ray.rewards.scoring import logged_means
from rlhf_ray.types import RewardFailure, ScoredGroup

__all__ = ["evaluation_metrics"]


def evaluation_metrics(outcomes: Sequence[ScoredGroup | RewardFailure], *, pass_threshold: float) -> dict[str, Any]:
    """Metrics of one held-out set; failed rewards are counted and left out of the others.

    Args:
        outcomes: One per prompt; all groups have the same number of completions, n.
        pass_threshold: A completion passes with a reward of at least this.

    Returns:
        Key -> value. ``reward_stderr`` needs two scored prompts, ``pass_at_<k>`` (k = 1, 2, 4, ... and n) one.
    """
    scored = [outcome for outcome in outcomes if isinstance(outcome, ScoredGroup)]
    completions = [c for group in scored for c in group.group.trajectories]
    logged = logged_means(scored).items()
    return {
        **_reward_metrics(scored, pass_threshold),
        **{f"rewards/{name}/{metric}": mean for name, metrics in logged for metric, mean in metrics.items()},
        "num_prompts": len(outcomes),
        "failures": len(outcomes) - len(scored),
        "completion_tokens_mean": float(np.mean([len(c.token_ids) for c in completions])) if completions else 0.0,
        "truncated_fraction": float(np.mean([c.truncated for c in completions])) if completions else 0.0,
    }


def _reward_metrics(scored: Sequence[ScoredGroup], pass_threshold: float) -> dict[str, float]:
    if not scored:
        return {"reward_mean": math.nan}
    rewards = np.stack([group.rewards for group in scored]).astype(np.float64)
    metrics = {"reward_mean": float(rewards.mean())}
    if len(scored) > 1:
        # Completions of a prompt are not independent draws from the set; their means are.
        metrics["reward_stderr"] = float(rewards.mean(axis=1).std(ddof=1) / math.sqrt(len(scored)))
    return metrics | _pass_metrics(rewards >= pass_threshold)


def _pass_metrics(passed: npt.NDArray[np.bool_]) -> dict[str, float]:
    num_samples = passed.shape[1]
    ks = sorted({2**power for power in range(num_samples.bit_length())} | {num_samples})
    return {f"pass_at_{k}": float(pass_at_k(passed.sum(axis=1), num_samples, k).mean()) for k in ks}
