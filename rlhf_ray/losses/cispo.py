"""Log-probabilities and advantages -> CISPO's policy loss, which clips weights and not tokens."""

from __future__ import annotations

from torch import Tensor

from rlhf_ray.losses.aggregation import aggregate
from rlhf_ray.losses.policy_tokens import PolicyTokens

__all__ = ["cispo_loss"]


def cispo_loss(
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
    """REINFORCE with importance weights that are clipped, so that every token keeps a gradient.

    With ``ratio = exp(logprobs - old_logprobs)`` and ``sg`` the stop-gradient, per token::

        L = -sg(clip(ratio, 1 - clip_low, 1 + clip_high)) * A * logprobs
        L = behavior_weight * L         when behavior_weights are given

    "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention" (arXiv:2506.13585), which sets no
    lower bound, here any ``clip_low`` of 1 or more, and divides by the number of tokens, ``token_mean``. Within the
    bounds the gradient, ``-ratio * A * grad(logprobs)``, is that of :func:`ppo_loss`; beyond them it is bounded
    instead of 0, whatever the sign of the advantage. The loss's *value* measures nothing: it is minus the weighted
    log-probability, and goes up and down with the policy's entropy.

    The log-ratio is bounded from above by :data:`~rlhf_ray.advantages.ratio.MAX_LOG_RATIO`. Only ``logprobs`` gets
    a gradient.

    >>> import torch
    >>> old, new = torch.tensor([[0.25, 0.5]]).log(), torch.tensor([[0.5, 0.5]]).log().requires_grad_()
    >>> loss, _ = cispo_loss(new, old, torch.ones(1, 2), torch.ones(1, 2), clip_low=1.0, clip_high=0.5)
    >>> loss.backward()
    >>> new.grad  # -1.5 / 2, although the ratio is 2, and -1 / 2
    tensor([[-0.7500, -0.5000]])

    Args:
        logprobs: ``[B, T]``, log-probabilities of the tokens under the policy being trained, in nats;
            computed in float32 when they are shorter.
        old_logprobs: ``[B, T]``, under the policy that the weight corrects for.
        advantages: ``[B, T]``.
        mask: ``[B, T]``, True where a token counts.
        clip_low: The weight is clipped from below at ``1 - clip_low``.
        clip_high: The weight is clipped from above at ``1 + clip_high``.
        behavior_weights: ``[B, T]``, weight of each token's loss, see :func:`behavior_weights`; None: 1.
        aggregation: See :func:`aggregate`.
        normalizer: The global denominator, see :func:`aggregate`.

    Returns:
        The loss, and the metrics of :func:`ppo_loss`. Here ``clip_fraction_low`` and ``clip_fraction_high`` count
        the tokens whose ratio lies below or above the bounds at any advantage.

    Raises:
        ValueError: The shapes differ, or a clip is negative.
    """
    clip = (clip_low, clip_high)
    tokens = PolicyTokens.of(logprobs, old_logprobs, advantages, mask, behavior_weights, clip=clip)
    ratio = tokens.ratio().detach()
    metrics = tokens.metrics(ratio, clipped_low=ratio < 1 - clip_low, clipped_high=ratio > 1 + clip_high)
    losses = -ratio.clamp(1 - clip_low, 1 + clip_high) * tokens.advantages * tokens.weights * tokens.logprobs
    return aggregate(losses, tokens.mask, aggregation, normalizer), metrics
