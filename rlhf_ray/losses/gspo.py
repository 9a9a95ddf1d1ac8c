"""Log-probabilities and advantages -> GSPO's policy loss, clipped by the whole sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ray.advantages.ratio import MAX_LOG_RATIO
from rlhf_ray.losses.policy_tokens import PolicyTokens

__all__ = ["gspo_loss"]


def gspo_loss(
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
    """PPO's clipped surrogate with one ratio for all tokens of a sequence: the geometric mean of theirs.

    With ``sg`` the stop-gradient, for token t of a sequence (a row) of n unmasked tokens::

        s   = exp(1/n * sum over its tokens of (logprobs - old_logprobs))
        s_t = sg(s) * exp(logprobs_t - sg(logprobs_t))
        L_t = -min(s_t * A_t, clip(s_t, 1 - clip_low, 1 + clip_high) * A_t)
        L_t = behavior_weight_t * L_t         when behavior_weights are given

    "Group Sequence Policy Optimization" (arXiv:2507.18071). This is its GSPO-token form: ``s_t`` has the value of
    the sequence's ratio and the gradient of its own token, ``s * grad(logprobs_t)``, so that advantages may differ
    between tokens. Where they do not, value and gradient of a row are those of the sequence form, in which ``s``
    itself is differentiated. A sequence beyond an active bound gets no gradient at any token whose advantage makes
    the bound active.

    - The paper averages tokens, then sequences: ``aggregation="seq_mean_token_mean"``.
    - Since ``s`` is a mean in log space, it stays much nearer to 1 than a token's ratio: the paper clips at 3e-4
      below and 4e-4 above.

    The mean log-ratio of a sequence is bounded from above by :data:`~rlhf_ray.advantages.ratio.MAX_LOG_RATIO`; its
    tokens are not, as in the paper. Only ``logprobs`` gets a gradient.

    >>> old, new = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.8, 0.2]]).log()
    >>> loss, metrics = gspo_loss(new, old, torch.tensor([[1.0, 1.0]]), torch.ones(1, 2), clip_low=0.2, clip_high=0.2)
    >>> round(loss.item(), 4), round(metrics["ratio_mean"].item(), 4)  # the root of 1.6 * 0.4
    (-0.8, 0.8)

    Args:
        logprobs: ``[B, T]``, log-probabilities of the tokens under the policy being trained, in nats, one sequence
            a row; computed in float32 when they are shorter.
        old_logprobs: ``[B, T]``, under the policy of which the loss stays near.
        advantages: ``[B, T]``.
        mask: ``[B, T]``, True where a token counts.
        clip_low: The sequence's ratio is clipped from below at ``1 - clip_low``.
        clip_high: The sequence's ratio is clipped from above at ``1 + clip_high``.
        behavior_weights: ``[B, T]``, weight of each token's loss, see :func:`behavior_weights`; None: 1.
        aggregation: See :func:`aggregate`.
        normalizer: The global denominator, see :func:`aggregate`.

    Returns:
        The loss, and the metrics of :func:`ppo_loss`, of which ``ratio_*`` and ``clip_fraction*`` are about the
        ratio of each token's sequence, ``approx_kl`` about the tokens.

    Raises:
        ValueError: The shapes differ, or a clip is negative.
    """
    clip = (clip_low, clip_high)
    tokens = PolicyTokens.of(logprobs, old_logprobs, advantages, mask, behavior_weights, clip=clip)
    log_ratios = tokens.log_ratio()
    # The straight-through term x - sg(x) is 0, but NaN for a token of probability 0, whose logarithm is infinite.
    finite = log_ratios.clamp(min=torch.finfo(log_ratios.dtype).min)
    means = tokens.sequence_mean(log_ratios.detach()) + (finite - finite.detach())
    return tokens.clipped_surrogate(means.clamp(max=MAX_LOG_RATIO).exp(), clip, aggregation, normalizer)
