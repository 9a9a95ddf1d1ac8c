"""Rewards and estimates -> advantages and returns on a learner rank, the same on any number of ranks."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from rlhf_ray.advantages import (
    AdaptiveKLController,
    Moments,
    explained_variance,
    kl,
    kl_penalized_rewards,
    whiten,
)
from rlhf_ray.config.plugins import Plugin
from rlhf_ray.config.settings import TrainingSettings
from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.learner.estimates import Estimates
from rlhf_ray.learner.mesh import gather_objects
from rlhf_ray.learner.metrics import MetricSums
from rlhf_ray.learner.trajectory_rows import TrajectoryRows
from rlhf_ray.losses import aggregate

__all__ = ["CreditAssignment", "gathered_rows", "merged_moments"]


class CreditAssignment:
    """Computes advantages by the run's plug-in and keeps the weight of the KL penalty.

    The plug-in sees trajectories: one reward for all sequences of each, or one row, or several where turns were in
    parallel.

    Args:
        training: The training section.
        plugin: The advantage, loaded.
        group: A rank for each share of the batch.
    """

    def __init__(self, training: TrainingSettings, plugin: Plugin, group: dist.ProcessGroup) -> None:
        self._training = training
        self._plugin = plugin
        self._group = group
        self._controller = (
            None
            if training.kl_target is None
            else AdaptiveKLController(
                init_coef=training.kl_coef, target=training.kl_target, horizon=training.kl_horizon
            )
        )

    @property
    def kl_coef(self) -> float:
        """Weight of the KL to the reference now."""
        return self._training.kl_coef if self._controller is None else self._controller.coef

    def adapt(self, kl_to_reference: float | None, num_trajectories: int) -> None:
        """Move the weight after an update; ``None``, or not finite: the batch gives nothing to go by."""
        if self._controller is not None and kl_to_reference is not None and math.isfinite(kl_to_reference):
            self._controller.update(kl_to_reference, num_trajectories)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold."""
        return {"kl_coef": torch.tensor([self.kl_coef], dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Continue with the weight of a checkpoint, where it is adapted."""
        if self._controller is not None:
            self._controller.load_state_dict({"coef": float(state["kl_coef"])})

    def assign(
        self, batch: SequenceBatch, estimates: Estimates, metrics: MetricSums, *, warms_up: bool = False
    ) -> tuple[Estimates, dict[str, float]]:
        """Add advantages and returns, whitened over all ranks where asked for; returns metrics of them too.

        Args:
            batch: This rank's sequences.
            estimates: What is known of them.
            metrics: Gets those of the KL.
            warms_up: Whether the critic is trained alone: its returns are then those of lambda 1 where it may have a
                lambda of its own.
        """
        training, mask = self._training, estimates.mask
        penalty = None
        if training.kl_in == "reward" and estimates.ref_logprobs is not None:
            assert estimates.proximal_logprobs is not None
            penalty = kl(estimates.proximal_logprobs, estimates.ref_logprobs, estimator=training.kl_estimator)
            means = {"kl_to_reference": penalty}
            if training.kl_clip is not None:
                means["kl_clip_fraction"] = (penalty.abs() > training.kl_clip).float()
                penalty = penalty.clamp(-training.kl_clip, training.kl_clip)
            tokens = float(batch.loss_lengths.sum())
            metrics.add({name: aggregate(x, mask, "token_mean") for name, x in means.items()}, tokens)
        returns: torch.Tensor | None = None
        if self._plugin.per_completion:
            advantages = self._of_trajectories(batch, penalty, mask)
        else:
            advantages, returns = self._of_tokens(batch, penalty, estimates, warms_up=warms_up)
        measured = [advantages]
        if returns is not None and estimates.values is not None:
            measured += [returns, returns - estimates.values]
        moments, *of_critic = merged_moments(self._group, mask, *measured)
        if training.whiten_advantages:
            advantages = whiten(advantages, mask, moments=moments)
        reported = {"advantage_mean": moments.mean, "advantage_std": moments.variance() ** 0.5}
        if of_critic:
            reported["explained_variance"] = explained_variance(*of_critic)
        return replace(estimates, advantages=advantages, returns=returns), reported

    def _of_tokens(
        self, batch: SequenceBatch, penalty: torch.Tensor | None, estimates: Estimates, *, warms_up: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Advantages of this rank's tokens, and returns where the plug-in gives them."""
        coef = 0.0 if penalty is None else self.kl_coef
        rows = TrajectoryRows(batch, estimates.mask.device)
        mask, values, bootstrap = rows.join(estimates.mask), estimates.values, estimates.bootstrap
        rewards = kl_penalized_rewards(estimates.rewards, estimates.mask, kl=penalty, coef=coef)
        result = self._plugin.call(
            {
                "rewards": rows.join_rewards(rewards, estimates.rewards),
                "values": None if values is None else rows.join(values),
                "mask": mask,
                "bootstrap": None if bootstrap is None else bootstrap[rows.ends],
                "turn_ids": rows.join(estimates.turn_ids),
                "gamma": self._training.gamma,
                "lam": self._training.lambda_,
                "critic_lam": 1.0 if warms_up else self._training.critic_lambda,
                "length_alpha": self._training.lambda_alpha,
            }
        )
        advantages, returns = result if isinstance(result, tuple) else (result, None)
        if self._plugin.needs_critic and returns is None:
            raise ValueError(f"advantage {self._plugin.name} takes values, so it must return (advantages, returns)")
        self._check_shape(advantages, mask.shape)
        return rows.split(advantages), None if returns is None else rows.split(returns)

    def _of_trajectories(self, batch: SequenceBatch, penalty: torch.Tensor | None, mask: torch.Tensor) -> torch.Tensor:
        """The trajectories' advantages, compared over all ranks, at each of their tokens."""
        rewards = torch.tensor(batch.rewards, device=mask.device)
        if penalty is not None:
            penalties = batch.per_trajectory((penalty * mask).sum(dim=1).cpu().numpy())
            rewards = rewards - self.kl_coef * torch.from_numpy(penalties).to(rewards)
        last, lengths = batch.last_sequences, batch.per_trajectory(batch.sampled_lengths)
        own = np.stack([batch.group_ids[last], lengths, batch.greedy_rewards[last]], axis=1).astype(np.float64)
        table, first = gathered_rows(
            torch.cat([rewards.double()[:, None], torch.tensor(own, device=mask.device)], dim=1), self._group
        )
        advantages = self._plugin.call(
            {
                "rewards": table[:, 0].float(),
                "group_ids": table[:, 1].long(),
                "lengths": table[:, 2].long(),
                "greedy_rewards": table[:, 3].float(),
            }
        )
        self._check_shape(advantages, table.shape[:1])
        return advantages[first + torch.from_numpy(batch.of_trajectory).to(mask.device), None] * mask

    def _check_shape(self, advantages: torch.Tensor, expected: torch.Size) -> None:
        if advantages.shape != expected:
            raise ValueError(
                f"advantage {self._plugin.name} returned {tuple(advantages.shape)}; expected {tuple(expected)}"
            )


def merged_moments(group: dist.ProcessGroup, mask: torch.Tensor, *tensors: torch.Tensor) -> list[Moments]:
    """Moments of each tensor where the mask is true, over the ranks of a group."""
    parts = gather_objects([Moments.of(tensor, mask) for tensor in tensors], group)
    return [sum(of_tensor, Moments()) for of_tensor in zip(*parts, strict=True)]


def gathered_rows(rows: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, int]:
    """The ``[N, K]`` rows of all ranks of a group, end to end, and where this rank's begin."""
    sizes = gather_objects(len(rows), group)
    padded = rows.new_zeros(max(sizes), rows.shape[1])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    table = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    return table, sum(sizes[: dist.get_rank(group)])
