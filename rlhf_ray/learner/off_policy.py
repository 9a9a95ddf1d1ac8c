"""Corrects the losses for tokens that another policy sampled, and tells how far it is from the proximal one.

That other policy is an earlier version, or what a quantized engine makes of the weights. Decoupled PPO ("AReaL: A
Large-Scale Asynchronous Reinforcement Learning System for Language Reasoning", arXiv:2505.24298): each loss is weighted
by how much likelier the proximal policy makes the token than the policy that sampled it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from rlhf_ray.config.settings import TrainingSettings
from rlhf_ray.learner.credit import gathered_rows
from rlhf_ray.learner.estimates import Estimates
from rlhf_ray.learner.layout import Microbatch
from rlhf_ray.losses import aggregate, behavior_weights, m2po_mask

__all__ = ["correction_weights", "effective_sample_size", "m2po_kept", "staleness_metrics"]


def correction_weights(
    training: TrainingSettings, known: Estimates, proximal_logprobs: torch.Tensor
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
            known.sampling_logprobs,
            known.mask,
            level=training.behavior_weights,
            mode=training.behavior_mode,
            cap=training.behavior_cap,
            floor=training.behavior_floor,
        )
    if known.kept is not None:
        kept = known.kept.float()
        metrics["m2po_masked_fraction"] = aggregate(1.0 - kept, known.mask, "token_mean")
        weights = kept if weights is None else weights * kept
    if training.behavior_weights != "none":
        assert weights is not None
        metrics["behavior_weight_square_mean"] = aggregate(weights.square(), known.mask, "token_mean")
    return weights, metrics


def effective_sample_size(metrics: dict[str, float]) -> dict[str, float]:
    """Replace the mean square of the weights by ``(sum w)^2 / (n * sum w^2)``, in place where there is one."""
    square = metrics.pop("behavior_weight_square_mean", None)
    if square is not None:
        metrics["effective_sample_size"] = metrics["behavior_weight_mean"] ** 2 / square if square > 0.0 else 0.0
    return metrics


def m2po_kept(estimates: Estimates, rows: torch.Tensor, *, threshold: float, group: dist.ProcessGroup) -> torch.Tensor:
    """Tokens of a minibatch that M2PO's trust region lets through, the same on any number of ranks.

    The policy before the update is used in place of the one that is trained, which it is in the first step.

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
    known: Estimates, micro: Microbatch, proximal_logprobs: torch.Tensor
) -> Iterator[tuple[dict[str, Any], float]]:
    """How far the sampling policy is from the proximal one, by version distance: means and numbers of tokens."""
    gaps = (proximal_logprobs - known.sampling_logprobs).abs()
    for distance, tokens in micro.num_by_staleness:
        mean = aggregate(gaps, known.mask & (known.staleness == distance), "token_mean")
        yield {f"proximal_logprob_diff_by_staleness/{distance}": mean}, float(tokens)
