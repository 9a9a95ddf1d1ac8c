"""A microbatch's log-probabilities -> the scalar that the backward pass starts at."""

from __future__ import annotations

from typing import Any

import torch

from rlhf_ray.config.plugins import Plugin
from rlhf_ray.config.settings import TrainingSettings
from rlhf_ray.learner.estimates import Estimates
from rlhf_ray.losses import entropy_bonus, kl_loss, likelihood_loss

__all__ = ["policy_objective"]


def policy_objective(
    training: TrainingSettings,
    plugin: Plugin,
    known: Estimates,
    *,
    logprobs: torch.Tensor,
    entropies: torch.Tensor,
    proximal_logprobs: torch.Tensor,
    behavior_weights: torch.Tensor | None,
    normalizer: float | torch.Tensor,
    successful_tokens: int,
    kl_coef: float,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """The policy loss of the run's plug-in, and what is added to it, of a microbatch.

    That is the entropy bonus, the likelihood of successful trajectories, and the KL to the reference.

    Args:
        training: The training section.
        plugin: The policy loss, loaded.
        known: What was known of the microbatch before the first step.
        logprobs: ``[B, T]``, with a gradient.
        entropies: ``[B, T]``, with a gradient where ``entropy_coef`` is not 0.
        proximal_logprobs: ``[B, T]``.
        behavior_weights: ``[B, T]``, correct for another sampling policy; ``None`` where nothing is corrected.
        normalizer: The global denominator, or ``[B]`` of each row.
        successful_tokens: Tokens of successful trajectories in the minibatch, over all ranks.
        kl_coef: Weight of the KL.

    Returns:
        The total to be minimized, the policy loss alone, and token means for the report.
    """
    aggregated: dict[str, Any] = {"aggregation": training.loss_aggregation, "normalizer": normalizer}
    loss, means = plugin.call(
        {
            "logprobs": logprobs,
            "old_logprobs": proximal_logprobs,
            "advantages": known.advantages,
            "mask": known.mask,
            "clip_low": training.clip_low,
            "clip_high": training.clip_high,
            "dual_clip": training.dual_clip,
            "behavior_weights": behavior_weights,
            **aggregated,
        }
    )
    total = loss
    if training.entropy_coef != 0.0:
        bonus, _ = entropy_bonus(entropies, known.mask, **aggregated)
        total = total - training.entropy_coef * bonus
    if training.nll_coef != 0.0 and successful_tokens:
        nll, _ = likelihood_loss(logprobs, known.mask & known.successful[:, None], normalizer=successful_tokens)
        total = total + training.nll_coef * nll
        means = {**means, "nll_loss": nll.detach()}
    if training.kl_in == "loss" and known.ref_logprobs is not None:
        divergence, _ = kl_loss(logprobs, known.ref_logprobs, known.mask, estimator=training.kl_estimator, **aggregated)
        total = total + kl_coef * divergence
    return total, loss, means
