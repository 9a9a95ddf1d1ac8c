"""Log-probabilities and advantages -> GMPO's policy loss, a geometric mean of clipped ratios."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ray.advantages.ratio import MAX_LOG_RATIO
from rlhf_ray.losses.aggregation import aggregate
from rlhf_ray.losses.policy_tokens import PolicyTokens

__all__ = ["gmpo_loss"]


def gmpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    behavior_weights: Tensor | None = None,
    aggregation: str = "token_mean",
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy loss with the geometric mean of a sequence's ratios, each clipped before the mean is taken.

    With ``d = logprobs - old_logprobs``, for token t of a sequence (a row) of n unmasked tokens::

        c_t = min(d_t, clip_high)       where A_t >= 0
        c_t = max(d_t, -clip_low)       where A_t < 0
        L_t = -exp(1/n * sum over its tokens of c) * A_t
        L_t = behavior_weight_t * L_t   when behavior_weights are given

    "Geometric-Mean Policy Optimization" (arXiv:2507.20673), its Algorithm 1. Two things to know:

    - The bounds are *log-ratios*, in nats: ratios are clipped at ``exp(-clip_low)`` and ``exp(clip_high)``. The paper
      takes 0.4 for both, wider than PPO's, for the mean makes an outlier harmless.
    - Its loss is one number a sequence, averaged over sequences: ``aggregation="seq_mean_token_mean"``. With
      advantages that differ between tokens, which the paper does not have, each token is clipped by its own sign, and
      that number is the mean advantage times the geometric mean.

    Of the sum of a row's losses the gradient is ``-(sum of A) / n * exp(mean of c) * grad(logprobs_t)`` at every
    token that is not clipped, and 0 at the others. With :func:`gspo_loss` the whole sequence keeps or loses it.

    The mean of ``c`` is bounded from above by :data:`~rlhf_ray.advantages.ratio.MAX_LOG_RATIO`; a token at a negative
    advantage is not, as in the paper. Only ``logprobs`` gets a gradient.

    >>> old, new = torch.tensor([[0.5, 0.1]]).log(), torch.tensor([[0.32, 0.9]]).log()
    >>> clip = {"clip_low": 0.4, "clip_high": 0.4}
    >>> loss, metrics = gmpo_loss(new, old, torch.ones(1, 2), torch.ones(1, 2), **clip)
    >>> round(loss.item(), 4), metrics["clip_fraction"].item()  # the root of 0.64 * exp(0.4): 9 was clipped
    (-0.9771, 0.5)

    Args:
        logprobs: ``[B, T]``, log-probabilities of the tokens under the policy being trained, in nats, one sequence
            a row; computed in float32 when they are shorter.
        old_logprobs: ``[B, T]``, under the policy of which the loss stays near.
        advantages: ``[B, T]``.
        mask: ``[B, T]``, True where a token counts.
        clip_low: Log-ratios are clipped from below at ``-clip_low``, in nats.
        clip_high: Log-ratios are clipped from above at ``clip_high``, in nats.
        behavior_weights: ``[B, T]``, weight of each token's loss, see :func:`behavior_weights`; None: 1.
        aggregation: See :func:`aggregate`.
        normalizer: The global denominator, see :func:`aggregate`.

    Returns:
        The loss, and the metrics of :func:`ppo_loss`, all about the ratios of tokens before they are clipped.

    Raises:
        ValueError: The shapes differ, or a clip is negative.
    """
    clip = (clip_low, clip_high)
    tokens = PolicyTokens.of(logprobs, old_logprobs, advantages, mask, behavior_weights, clip=clip)
    log_ratios = tokens.log_ratio()
    clipped = torch.where(tokens.advantages >= 0, log_ratios.clamp(max=clip_high), log_ratios.clamp(min=-clip_low))
    means = tokens.sequence_mean(clipped).clamp(max=MAX_LOG_RATIO)
    metrics = tokens.metrics(
        log_ratios.clamp(max=MAX_LOG_RATIO).exp(),
        clipped_low=(tokens.advantages < 0) & (log_ratios < -clip_low),
        clipped_high=(tokens.advantages > 0) & (log_ratios > clip_high),
    )
    return aggregate(-tokens.advantages * means.exp() * tokens.weights, tokens.mask, aggregation, normalizer), metrics
