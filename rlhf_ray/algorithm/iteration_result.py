"""Turns what one iteration produced into the nested result dictionary; keys are declared in reporting/metrics.py."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.learner.packing import UpdatePlan
from rlhf_ray.rewards.scoring import logged_means
from rlhf_ray.rollouts.flow import Collected
from rlhf_ray.weight_sync.publisher import Publication

__all__ = ["iteration_result"]

_TIMERS = ("advantage_s", "update_s")


def iteration_result(
    collected: Collected,
    batch: SequenceBatch,
    plan: UpdatePlan,
    figures: Mapping[str, float],
    publication: Publication,
    *,
    policy_version: int,
    weight_sync_s: float,
    iteration_s: float,
) -> dict[str, Any]:
    """Assemble the result of one iteration.

    Args:
        collected: The scored groups and how they came about.
        batch: The same as sequences.
        plan: How they were split.
        figures: The learners' answer.
        publication: The last one that every replica acknowledged.
        policy_version: The version that this update made.
        weight_sync_s: Seconds for which weight sync held training up.
        iteration_s: Seconds of the whole iteration.
    """
    timers = {name: figures[name] for name in _TIMERS}
    learner_s = sum(timers.values())
    tokens = int(batch.lengths.sum())
    return {
        "rollouts": _rollout_metrics(collected, batch)
        | {
            "equal_reward_groups": collected.equal_reward_groups,
            "carried_groups": collected.carried_groups,
        },
        "rewards": _reward_metrics(collected),
        "learner": _nested({name: value for name, value in figures.items() if name not in _TIMERS})
        | {
            "num_tokens": tokens,
            "num_microbatches": sum(len(m.microbatches) for m in plan.ranks[0].minibatches),
            "padding_fraction": plan.padding_fraction,
            "tokens_per_s": tokens / learner_s,
            "idle_fraction": max(0.0, 1.0 - learner_s / iteration_s),
            "policy_version": policy_version,
        },
        "weight_sync": {
            "size_bytes": publication.size_bytes,
            "pause_s": publication.pause_s,
            "publication_s": publication.publication_s,
            "num_replicas": len(publication.replica_ids),
        },
        "timers": timers
        | {
            "rollout_s": collected.rollout_s,
            "reward_s": collected.reward_s,
            "weight_sync_s": weight_sync_s,
            "iteration_s": iteration_s,
        },
    }


def _rollout_metrics(collected: Collected, batch: SequenceBatch) -> dict[str, Any]:
    # As the functions gave them; the batch's own may be shaped.
    rewards = np.concatenate([scored.rewards for scored in collected.groups])
    staleness = batch.staleness[batch.loss_mask]
    return {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "completion_tokens_mean": float(batch.sampled_lengths.mean()),
        "completion_tokens_max": int(batch.sampled_lengths.max()),
        "prompt_tokens_mean": float(batch.prompt_lengths.mean()),
        "truncated_fraction": float(batch.truncated.mean()),
        "tokens_per_s": collected.generated_tokens / collected.generating_s if collected.generating_s > 0 else 0.0,
        "idle_fraction": max(0.0, 1.0 - collected.generating_s / collected.elapsed_s),
        "in_loss_fraction": len(staleness) / int(batch.sampled.sum()),
        "staleness_mean": float(staleness.mean()) if len(staleness) else 0.0,
        "staleness_max": int(staleness.max(initial=0)),
        "staleness_fraction": {
            str(distance): float(count) / len(staleness)
            for distance, count in zip(*np.unique(staleness, return_counts=True), strict=True)
        },
        "num_groups": len(collected.groups),
        "num_completions": len(batch),
    }


def _nested(figures: Mapping[str, float]) -> dict[str, Any]:
    """``{"a/b": 1}`` to ``{"a": {"b": 1}}``."""
    nested: dict[str, Any] = {}
    for name, value in figures.items():
        outer, slash, inner = name.partition("/")
        if slash:
            nested.setdefault(outer, {})[inner] = value
        else:
            nested[name] = value
    return nested


def _reward_metrics(collected: Collected) -> dict[str, Any]:
    by_function: defaultdict[str, list[np.ndarray[Any, Any]]] = defaultdict(list)
    for scored in collected.groups:
        for name, values in scored.rewards_by_function.items():
            by_function[name].append(values)
    metrics: dict[str, Any] = {}
    for name, parts in by_function.items():
        values = np.concatenate(parts)
        applied = values[~np.isnan(values)]
        metrics[name] = {"mean": float(applied.mean()) if len(applied) else float("nan")}
    for name, logged in logged_means(collected.groups).items():
        metrics[name] |= logged
    return metrics | {"failures": dict(collected.failures)}
