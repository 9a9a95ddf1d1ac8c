"""Rewards of sequences or of their tokens, and the KL to the reference -> one reward per token."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ray.advantages.padding import blank, checked_mask

__all__ = ["kl_penalized_rewards"]


def kl_penalized_rewards(rewards: Tensor, mask: Tensor, *, kl: Tensor | None = None, coef: float = 0.0) -> Tensor:
    """Put each sequence's reward on its last token, less ``coef * kl`` on every token.

    ``r_t = reward * [t is the last unmasked token] - coef * kl_t``, as in "Fine-Tuning Language Models from Human
    Preferences" (arXiv:1909.08593) and "Training language models to follow instructions with human feedback"
    (arXiv:2203.02155). Rewards that have places already, those of several turns, keep them.

    >>> kl = torch.tensor([[0.5, 0.25, 7.0]])
    >>> kl_penalized_rewards(torch.tensor([1.0]), torch.tensor([[1, 1, 0]]), kl=kl, coef=0.5)
    tensor([[-0.2500,  0.8750,  0.0000]])

    Args:
        rewards: ``[B]``, reward of each sequence: that of a row without unmasked tokens has no place and is lost. Or
            ``[B, T]``, reward of each token.
        mask: ``[B, T]``, True where a token was chosen by the policy.
        kl: ``[B, T]``, per-token KL of the policy that sampled (or of the proximal policy) to the reference, in
            nats; None: no penalty.
        coef: Weight of the penalty, in reward per nat.

    Returns:
        ``[B, T]`` float32 (float64 if an input is), 0 at masked positions; carries no gradient.

    Raises:
        ValueError: The shapes do not fit, or ``coef`` is not 0 and ``kl`` is missing.
    """
    mask = checked_mask(mask, ndim=2, **({} if kl is None else {"kl": kl}))
    if rewards.shape not in (mask.shape, mask.shape[:1]):
        shapes = f"rewards {tuple(rewards.shape)} do not fit mask {tuple(mask.shape)}"
        raise ValueError(f"{shapes}; expected [B] or [B, T]")
    if kl is None and coef != 0.0:
        raise ValueError(f"coef = {coef} needs kl")
    places = mask
    if rewards.ndim == 1:
        rewards, places = rewards[:, None].expand(mask.shape), _last_token(mask)
    token_rewards = blank(rewards.detach(), places)
    return token_rewards if kl is None else token_rewards - coef * blank(kl.detach(), mask)


def _last_token(mask: Tensor) -> Tensor:
    """Mark the last True of each row."""
    still_to_come = mask.flip(1).cumsum(1).flip(1)
    return mask & (still_to_come == torch.ones_like(still_to_come))
