"""Used by the losses of stage 5 that clip a ratio (PPO's by token, GSPO's by sequence): bound, weigh, aggregate."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ray.losses.aggregation import aggregate
from rlhf_ray.losses.policy_metrics import policy_metrics

__all__ = ["clipped_surrogate"]


def clipped_surrogate(
    ratio: Tensor,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    aggregation: str,
    normalizer: float | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return ``-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)``, weighted and aggregated.

    The tensors, ``[B, T]`` each, are those that :func:`policy_inputs` returns; ``ratio`` carries the gradient.
    The metrics are those of :func:`policy_metrics` about that ratio.
    """
    # The min, case by case: a positive advantage bounds the ratio from above only, a negative one from below (and,
    # dual clip, from above).
    bounded = torch.where(advantages >= 0, ratio.clamp(max=1 + clip_high), ratio.clamp(min=1 - clip_low, max=dual_clip))
    metrics = policy_metrics(
        logprobs,
        old_logprobs,
        ratio,
        mask,
        clipped_low=(advantages < 0) & (ratio < 1 - clip_low),
        clipped_high=(advantages > 0) & (ratio > 1 + clip_high),
    )
    return aggregate(-advantages * bounded * weights, mask, aggregation, normalizer), metrics
