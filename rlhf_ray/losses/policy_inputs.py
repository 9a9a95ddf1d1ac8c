"""Used by every policy loss of stage 5: what is checked and cleaned before the first operation of the formula."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ray.advantages.padding import blank, checked_mask

__all__ = ["check_clip", "policy_inputs"]


def policy_inputs(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, behavior_weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Check the shapes, :func:`blank` all that is not the mask, and leave a gradient to ``logprobs`` alone.

    Args:
        logprobs: ``[B, T]``, log-probabilities under the policy being trained, in nats.
        old_logprobs: ``[B, T]``, under the policy of the ratio's denominator, in nats.
        advantages: ``[B, T]``.
        mask: ``[B, T]``, True where a token counts.
        behavior_weights: ``[B, T]``, weight of each token's loss; none: 1.

    Returns:
        Log-probabilities, old log-probabilities, advantages, weights, and the mask as booleans, ``[B, T]`` each.

    Raises:
        ValueError: The shapes differ, or they have not two dimensions.
    """
    given = {} if behavior_weights is None else {"behavior_weights": behavior_weights}
    mask = checked_mask(mask, ndim=2, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, **given)
    weights = torch.ones_like(advantages) if behavior_weights is None else behavior_weights
    old_logprobs, advantages, weights = (blank(x.detach(), mask) for x in (old_logprobs, advantages, weights))
    return blank(logprobs, mask), old_logprobs, advantages, weights, mask


def check_clip(clip_low: float, clip_high: float) -> None:
    """Refuse a negative bound, and one that is not a number.

    Raises:
        ValueError: Either is.
    """
    if not (clip_low >= 0 and clip_high >= 0):
        raise ValueError(f"clip_low = {clip_low}, clip_high = {clip_high}: must not be negative")
