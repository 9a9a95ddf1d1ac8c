"""A microbatch's log-probabilities -> the scalar that the backward pass starts at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from rlhf_ray.config.plugins import Plugin
from rlhf_ray.config.settings import TrainingSettings
from rlhf_ray.learner.credit import gathered_rows
from rlhf_ray.learner.estimates import Estimates, gather_rows
from rlhf_ray.learner.layout import Microbatch
from rlhf_ray.losses import aggregate, behavior_weights, entropy_bonus, kl_loss, m2po_mask

__all__ = [
    "PolicyTerms",
    "correction_weights",
    "effective_sample_size",
    "m2po_kept",
    "policy_objective",
    "staleness_metrics",
]


def correction_weights(
    training: TrainingSettings, estimates: Estimates, micro: Microbatch, proximal_logprobs: torch.Tensor
) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """Weights of a microbatch's tokens and their metrics, as the settings ask; ``None``: data is not corrected.

    Tokens that are not kept have a weight of 0 and stay in the denominators. Of the metrics
    :func:`effective_sample_size` makes the batch's, which no mean over microbatches is.
    """
    metrics: dict[str, torch.Tensor] = {}
    weights: torch.Tensor | None = None
    if training.behavior_weights != "none":
        weights, metrics = behavior_weights(
            proximal_logprobs,
            gather_rows(estimates.sampling_logprobs, micro),
            micro.mask,
            level=training.behavior_weights,
            mode=training.behavior_mode,
            cap=training.behavior_cap,
            floor=training.behavior_floor,
        )
    if estimates.kept is not None:
        kept = gather_rows(estimates.kept, micro).float()
        metrics["m2po_masked_fraction"] = aggregate(1.0 - kept, micro.mask, "token_mean")
        weights = kept if weights is None else weights * kept
    if training.behavior_weights != "none":
        assert weights is not None
        metrics["behavior_weight_square_mean"] = aggregate(weights.square(), micro.mask, "token_mean")
    return weights, metrics


def effective_sample_size(metrics: dict[str, float]) -> dict[str, float]:
    """Replace the mean square of the weights by ``(sum w)^2 / (n * sum w^2)``, in place where there is one."""
    square = metrics.pop("behavior_weight_square_mean", None)
    if square is not None:
        metrics["effective_sample_size"] = metrics["behavior_weight_mean"] ** 2 / square if square > 0.0 else 0.0
    return metrics


def m2po_kept(estimates: Estimates, rows: torch.Tensor, *, threshold: float, group: dist.ProcessGroup) -> torch.Tensor:
    """Tokens of a minibatch that M2PO's trust region lets through, the same on any number of ranks.

    The policy before the update stands for the one that is trained, which it is in the first step.

    Args:
        estimates: The rank's batch, advantages included.
        rows: ``[B]`` the minibatch's sequences on this rank.
        threshold: Largest mean of the squared log-ratio, in square nats.
        group: A rank for each share of the batch.

    Returns:
        ``[B, T]`` bool.
    """
    assert estimates.advantages is not None
    assert estimates.proximal_logprobs is not None
    return m2po_mask(
        estimates.proximal_logprobs[rows],
        estimates.sampling_logprobs[rows],
        estimates.advantages[rows],
        estimates.mask[rows],
        threshold=threshold,
        gather=lambda squares: gathered_rows(squares[:, None], group)[0][:, 0],
    )


def staleness_metrics(
    estimates: Estimates, micro: Microbatch, proximal_logprobs: torch.Tensor
) -> Iterator[tuple[dict[str, Any], float]]:
    """How far the sampling policy is from the proximal one, by version distance: means and numbers of tokens."""
    gaps = (proximal_logprobs - gather_rows(estimates.sampling_logprobs, micro)).abs()
    staleness = gather_rows(estimates.staleness, micro)
    for distance, tokens in micro.num_by_staleness:
        mean = aggregate(gaps, micro.mask & (staleness == distance), "token_mean")
        yield {f"proximal_logprob_diff_by_staleness/{distance}": mean}, float(tokens)


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
