"""Log-probabilities and advantages -> the tokens that M2PO's trust region lets through."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_ray.advantages.padding import blank, checked_mask

__all__ = ["m2po_mask"]


def m2po_mask(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    threshold: float,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Drop the tokens that moved furthest, until the mean squared log-ratio of the others is at most ``threshold``.

    With ``d = logprobs - old_logprobs``::

        T = unmasked tokens with A > 0 and d > 0, or with A < 0 and d < 0
        while mean over T of d^2 > threshold:   drop from T the token of largest d^2
        keep = T, and every unmasked token that never was in T

    "Prosperity before Collapse: How Far Can Off-Policy RL Reach with Stale Data on LLMs?" (arXiv:2510.01161), its
    Algorithm 1, with ``old_logprobs`` of the behavior policy and a threshold of 0.04. T holds the tokens that PPO's
    clip may act on; of the others, which the update pulls back toward the old policy, none is dropped, and none
    enters the mean. Of tokens with equal ``d^2`` the later, in row order, is dropped first.

    - **The mean is over the whole minibatch.** Call this once on all of its sequences, over all microbatches and
      ranks: what is kept of a part alone is something else. Where other ranks hold some of them, ``gather`` brings
      their ``d^2``; tokens of equal ``d^2``, which have no order then, are dropped together.
    - The paper's loss is ``-keep * ratio * A``, which is :func:`ppo_loss` with ``clip_low=1.0``,
      ``clip_high=math.inf``, ``aggregation="seq_mean_token_mean"`` and the result as ``behavior_weights``: the
      dropped tokens stay in the denominator, as those do that PPO clips. As ``mask`` it would take them out.

    >>> old, new = torch.zeros(1, 4), torch.tensor([[0.1, 0.2, 0.5, -0.9]])
    >>> m2po_mask(new, old, torch.ones(1, 4), torch.ones(1, 4), threshold=0.04)  # the mean of 0.01 and 0.04 is 0.025
    tensor([[ True,  True, False,  True]])

    Args:
        logprobs: ``[B, T]``, log-probabilities of the tokens under the policy being trained, in nats.
        old_logprobs: ``[B, T]``, under the policy that wrote them, in nats.
        advantages: ``[B, T]``; only their signs are used.
        mask: ``[B, T]``, True where a token counts.
        threshold: Largest mean of ``d^2``, in square nats, positive.
        gather: From this call's ``[n]`` values of ``d^2`` in T to those of all calls; None: this call has all of T.

    Returns:
        ``[B, T]`` bool, True where a token is kept, False where ``mask`` is; no gradient.

    Raises:
        ValueError: The shapes differ, or the threshold is not positive.
    """
    mask = checked_mask(mask, ndim=2, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    if not threshold > 0:
        raise ValueError(f"threshold = {threshold}: must be positive")
    differences = blank(logprobs.detach(), mask) - blank(old_logprobs.detach(), mask)
    constrained = mask & (differences.sign() * blank(advantages.detach(), mask).sign() > 0)
    # A running sum over all tokens of a batch: float32 would lose the small ones.
    squares = differences.double().square()
    own = squares[constrained]
    moments, order = (own if gather is None else gather(own)).sort(stable=True)
    # Means of ever larger moments rise, so what lies above the threshold is the end of the row.
    dropped = moments.cumsum(0) / torch.arange(1, len(moments) + 1, device=moments.device) > threshold
    if gather is not None:
        return mask & ~(constrained & (squares >= moments[dropped].min())) if dropped.any() else mask
    rows, columns = constrained.nonzero()[order[dropped]].unbind(1)
    kept = mask.clone()
    kept[rows, columns] = False
    return kept
