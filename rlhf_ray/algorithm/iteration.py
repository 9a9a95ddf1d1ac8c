"""How far a run is: one value, from the first prompt of an iteration to its result (keys: reporting/metrics.py)."""

from __future__ import annotations

import enum
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from rlhf_ray.config.nested import nested
from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.learner.packing import UpdatePlan
from rlhf_ray.learner.remote.commands import UpdateResult
from rlhf_ray.rewards.scoring import logged_means
from rlhf_ray.rollouts.tally import Collected
from rlhf_ray.types import EnvironmentStats, Trajectory
from rlhf_ray.weight_sync.publisher import SyncResult

__all__ = ["Iteration", "Stage", "is_due", "iteration_result"]

_TIMERS = ("advantage_s", "update_s")


class Stage(enum.Enum):
    """What an iteration is doing."""

    COLLECTING = enum.auto()
    UPDATING = enum.auto()
    PUBLISHING = enum.auto()
    DONE = enum.auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Iteration:
    """The iteration that is being made, and what it has come to; the Algorithm replaces it as a whole.

    What happens where something dies, or Ctrl-C or an error ends ``train()`` and it is called again:

    ========== ================================================= ==================================================
    stage      repeated                                          kept
    ========== ================================================= ==================================================
    collecting groups that were in flight, with their seeds      groups that were scored, and a batch that was ready
    updating   the update: ranks that made it repeat their       the batch of groups
               answer, ranks that were started again make it
               from the newest state that all of them keep
    publishing gathering and delivering the policy               the update, and the batch that it was made from
    done       evaluation, checkpoint and report                 the result
    ========== ================================================= ==================================================

    Learners that lost their state end every stage: the run is rewound to its newest checkpoint, under the version after
    :attr:`newest_version`, and nothing is kept. A run that is restored or rewound begins by publishing, with nothing
    collected.
    """

    version: int = 0
    """Policy version that the learners have; while they are updating they may have the next one."""
    stage: Stage = Stage.COLLECTING
    collected: Collected | None = None
    batch: SequenceBatch | None = None
    """What the update was made from."""
    plan: UpdatePlan | None = None
    update: UpdateResult | None = None
    publication: SyncResult | None = None
    """The last one that every replica acknowledged."""
    result: dict[str, Any] | None = None

    @classmethod
    def loaded(cls, version: int) -> Self:
        """The iteration after a restore: policy ``version`` is in the learners alone."""
        return cls(version=version, stage=Stage.PUBLISHING)

    @property
    def newest_version(self) -> int:
        """The newest that a replica can have: one that starts takes what the learners have."""
        return self.version + (self.stage is Stage.UPDATING)

    @property
    def is_loaded(self) -> bool:
        """Whether it begins by publishing what was loaded."""
        return self.stage is Stage.PUBLISHING and self.update is None

    @property
    def is_interrupted(self) -> bool:
        """Whether its update began, and it has no result."""
        return self.stage is not Stage.COLLECTING and not self.is_loaded and self.result is None


def is_due(interval: int, number: int) -> bool:
    """Whether something that happens every so many iterations, 0 for never, happens in this one."""
    return interval > 0 and number % interval == 0


def iteration_result(iteration: Iteration, *, weight_sync_s: float, iteration_s: float) -> dict[str, Any]:
    """Assemble the result of one iteration.

    Args:
        iteration: One that is done.
        weight_sync_s: Seconds for which weight sync held training up.
        iteration_s: Seconds of the whole iteration.
    """
    collected, batch, plan = iteration.collected, iteration.batch, iteration.plan
    update, publication = iteration.update, iteration.publication
    assert collected and batch and plan and update and publication, "collect(), update() and publish() come first"
    timers = {name: update.metrics[name] for name in _TIMERS}
    learner_s = sum(timers.values())
    tokens = int(batch.lengths.sum())
    return {
        "rollouts": _rollout_metrics(collected, batch),
        "rewards": _reward_metrics(collected),
        **({"environment": environments} if (environments := _environment_metrics(collected)) else {}),
        "learner": nested({name: value for name, value in update.metrics.items() if name not in _TIMERS}, separator="/")
        | {
            "num_tokens": tokens,
            "num_microbatches": sum(len(m.microbatches) for m in plan.ranks[0].minibatches),
            "padding_fraction": plan.padding_fraction,
            "tokens_per_s": tokens / learner_s,
            "idle_fraction": max(0.0, 1.0 - learner_s / iteration_s),
            "policy_version": iteration.version,
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
    # Of the groups: a trajectory may have several rows of the batch.
    groups = [scored.group for scored in collected.groups]
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    sampled = np.asarray([trajectory.num_sampled for trajectory in trajectories])
    observed: dict[str, float] = {}
    if any(group.environment for group in groups):
        tokens = [sum(len(one.token_ids) for one in trajectory.sequences) for trajectory in trajectories]
        observed["observed_tokens_mean"] = float((np.asarray(tokens) - sampled).mean())
    return {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "completion_tokens_mean": float(sampled.mean()),
        "completion_tokens_max": int(sampled.max()),
        "prompt_tokens_mean": float(np.mean([len(g.prompt.token_ids) for g in groups for _ in g.trajectories])),
        "truncated_fraction": float(np.mean([trajectory.truncated for trajectory in trajectories])),
        "turns_mean": float(np.mean([len(trajectory.all_turns) for trajectory in trajectories])),
        **observed,
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
        "num_completions": len(trajectories),
        "equal_reward_groups": collected.equal_reward_groups,
        "carried_groups": collected.carried_groups,
    }


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


def _environment_metrics(collected: Collected) -> dict[str, Any]:
    """Name of an environment -> its metrics; empty where a run has none."""
    played: defaultdict[str, list[Trajectory]] = defaultdict(list)
    for scored in collected.groups:
        if scored.group.environment:
            played[scored.group.environment] += scored.group.trajectories
    metrics: dict[str, Any] = {}
    for name in sorted(played.keys() | collected.environments.keys()):
        stats = collected.environments.get(name, EnvironmentStats())
        own: dict[str, Any] = {metric: total / count for metric, (total, count) in stats.metrics.items()}
        if stats.steps:
            own["step_s"] = stats.steps_s / stats.steps
        if trajectories := played[name]:
            own["reward_mean"] = float(np.mean([trajectory.environment_reward for trajectory in trajectories]))
            own["steps_mean"] = float(np.mean([len(trajectory.all_turns) for trajectory in trajectories]))
        metrics[name] = own | {"failures": dict(stats.failures)}
    return metrics
