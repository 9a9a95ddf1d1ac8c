"""A microbatch's log-probabilities -> the scalar that the backward pass starts at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rlhf_ray.config.plugins import Plugin
from rlhf_ray.config.settings import TrainingSettings
from rlhf_ray.losses import entropy_bonus, kl_loss

__all__ = ["PolicyTerms", "policy_objective"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTerms:
    """What the objective reads of a microbatch, ``[B, T]`` each."""

    logprobs: torch.Tensor
    """With a gradient."""
    entropies: torch.Tensor
    """With a gradient where ``entropy_coef`` is not 0."""
    proximal_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    behavior_weights: torch.Tensor | None
    """Correct for another sampling policy; ``None`` where nothing is corrected."""
    mask: torch.Tensor


def policy_objective(
    training: TrainingSettings, plugin: Plugin, terms: PolicyTerms, *, normalizer: float, kl_coef: float
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """The policy loss of the run's plug-in, the entropy bonus and the KL to the reference.

    Returns:
        The total to be minimized, the policy loss alone, and token means for the report.
    """
    aggregated: dict[str, Any] = {"aggregation": training.loss_aggregation, "normalizer": normalizer}
    loss, means = plugin.call(
        {
            "logprobs": terms.logprobs,
            "old_logprobs": terms.proximal_logprobs,
            "advantages": terms.advantages,
            "mask": terms.mask,
            "clip_low": training.clip_low,
            "clip_high": training.clip_high,
            "dual_clip": training.dual_clip,
            "behavior_weights": terms.behavior_weights,
            **aggregated,
        }
    )
    total = loss
    if training.entropy_coef != 0.0:
        bonus, _ = entropy_bonus(terms.entropies, terms.mask, **aggregated)
        total = total - training.entropy_coef * bonus
    if training.kl_in == "loss" and terms.ref_logprobs is not None:
        divergence, _ = kl_loss(
            terms.logprobs, terms.ref_logprobs, terms.mask, estimator=training.kl_estimator, **aggregated
        )
        total = total + kl_coef * divergence
    return total, loss, means
