"""Rewards, the whole stage: reward functions on their pool, reward models on theirs, and the sum of both."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from rlhf_ray.config.settings import RewardSettings
from rlhf_ray.rewards.arguments import TrainingProgress
from rlhf_ray.rewards.functions import resolve_rewards
from rlhf_ray.rewards.pool import RewardPool
from rlhf_ray.rewards.reward_model.pool import ModelPoolSpec, RewardModelPool
from rlhf_ray.rewards.reward_model.reward import RewardModelReward
from rlhf_ray.rewards.scoring import Scores, Tokenizer
from rlhf_ray.rewards.shipping import pack
from rlhf_ray.stopping import stop_all
from rlhf_ray.types import Float32Array, RewardFailure, RolloutGroup, ScoredGroup, TraceSpan

__all__ = ["CombinedRewards", "RewardStage", "reward_stage"]


class RewardStage(Protocol):
    """What scores a run's groups."""

    progress: TrainingProgress
    """What ``trainer_state`` of reward functions follows from."""

    @property
    def workers_replaced(self) -> int:
        """Reward actors that died, or were killed at a time limit, since the start."""

    def take_spans(self) -> list[TraceSpan]:
        """What each actor did since the last call, for the timeline."""

    def start(self) -> None:
        """Start the actors and wait until they stand."""

    async def score(self, group: RolloutGroup) -> ScoredGroup | RewardFailure:
        """Score a group, or say why it cannot be scored."""

    def stop(self) -> None:
        """End the actors."""


class CombinedRewards:
    """Scores each group with the functions and every reward model at once, and adds up.

    Args:
        functions: The pool of the reward functions, which leaves out no completion; none: there are none.
        models: One pool a reward model, at least one.
        names: Of all rewards, in the order of the settings.
    """

    def __init__(
        self, functions: RewardPool | None, models: Sequence[RewardModelPool], *, names: Sequence[str]
    ) -> None:
        self._functions = functions
        self._models = tuple(models)
        self._pools: tuple[RewardPool | RewardModelPool, ...] = (
            self._models if functions is None else (functions, *self._models)
        )
        self._names = tuple(names)

    @property
    def workers_replaced(self) -> int:
        """Actors of functions and models that were replaced since the start."""
        return sum(pool.workers_replaced for pool in self._pools)

    @property
    def progress(self) -> TrainingProgress:
        """What ``trainer_state`` of reward functions follows from; models know nothing of it."""
        return TrainingProgress() if self._functions is None else self._functions.progress

    @progress.setter
    def progress(self, progress: TrainingProgress) -> None:
        if self._functions is not None:
            self._functions.progress = progress

    def take_spans(self) -> list[TraceSpan]:
        """What each actor of functions and models did since the last call."""
        return [span for pool in self._pools for span in pool.take_spans()]

    def start(self) -> None:
        """Start everything side by side and wait for all.

        Raises:
            ConfigError: A reward model cannot be used.
            RewardError: Actors do not start in their time.
        """
        for model in self._models:
            model.launch()
        if self._functions is not None:
            self._functions.start()
        for model in self._models:
            model.wait_ready()

    async def score(self, group: RolloutGroup) -> ScoredGroup | RewardFailure:
        """Score ``group``; where several fail, the functions' failure is the one that is told.

        Raises:
            RewardError: A pool is stopped, or its last actor could not be replaced.
            DataError: A dataset column has the name of an argument that has a value already.
        """
        outcomes = await asyncio.gather(*(pool.score(group) for pool in self._pools))
        scored: list[ScoredGroup | Scores] = []
        for outcome in outcomes:
            if isinstance(outcome, RewardFailure):
                return outcome
            scored.append(outcome)
        return self._sum(group, scored)

    def stop(self) -> None:
        """End all actors, whatever another pool raises."""
        stop_all(*(("reward workers", pool.stop) for pool in self._pools))

    def _sum(self, group: RolloutGroup, scored: Sequence[ScoredGroup | Scores]) -> ScoredGroup | RewardFailure:
        with np.errstate(over="ignore"):
            total = np.stack([one.rewards for one in scored]).sum(axis=0, dtype=np.float64)
            rewards: Float32Array = total.astype(np.float32)
        if not np.isfinite(rewards).all():
            message = "the weighted sum of the rewards is beyond float32's range"
            return RewardFailure(group_id=group.group_id, kind="not_finite", message=message)
        by_function = {name: values for one in scored for name, values in one.rewards_by_function.items()}
        return ScoredGroup(
            group=group,
            rewards=rewards,
            rewards_by_function={name: by_function[name] for name in self._names},
            texts=scored[0].texts,
            reward_s=max(one.reward_s for one in scored),
            logged={name: metrics for one in scored for name, metrics in one.logged.items()},
            extras={name: values for one in scored for name, values in one.extras.items()},
        )


def reward_stage(
    settings: RewardSettings,
    *,
    run_id: str,
    tokenizer_path: str,
    tokenizer: Tokenizer | None,
    trust_remote_code: bool,
    num_cpus: float,
    on_gpu: bool,
) -> RewardStage:
    """Make what scores a run's groups; nothing is started yet.

    Args:
        settings: The ``rewards`` section.
        run_id: First part of the names of reward models' actors.
        tokenizer_path: Folder or hub id of the policy's tokenizer.
        tokenizer: A tokenizer to send along instead of loading ``tokenizer_path``.
        trust_remote_code: Run code that ships with the tokenizer.
        num_cpus: CPUs that Ray reserves for an actor.
        on_gpu: Whether the run is on GPUs.

    Raises:
        ConfigError: A reward or weight is wrong.
    """
    rewards = resolve_rewards(settings)
    models = [reward for reward in rewards if isinstance(reward.function, RewardModelReward)]
    functions = [reward for reward in rewards if not isinstance(reward.function, RewardModelReward)]

    def pool() -> RewardPool:
        return RewardPool(
            settings,
            rewards=functions,
            part_of_sum=bool(models),
            tokenizer_path=tokenizer_path,
            num_cpus=num_cpus,
            trust_remote_code=trust_remote_code,
            tokenizer=tokenizer,
        )

    if not models:
        return pool()
    spec = ModelPoolSpec(
        run_id=run_id,
        policy_tokenizer=tokenizer_path if tokenizer is None else pack(tokenizer, defined_by=tokenizer),
        trust_remote_code=trust_remote_code,
        num_cpus=num_cpus,
        on_gpu=on_gpu,
    )
    return CombinedRewards(
        pool() if functions else None,
        [RewardModelPool(model, spec) for model in models],
        names=[reward.name for reward in rewards],
    )
