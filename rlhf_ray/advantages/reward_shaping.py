"""Rewards as the reward functions gave them -> on the scale, and at the tokens, that the update wants them."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ray.advantages.groups import Groups, narrow
from rlhf_ray.advantages.padding import blank, checked_mask

__all__ = ["kl_penalized_rewards", "normalize_rewards", "shape_rewards"]


def shape_rewards(rewards: Tensor, *, bias: float = 0.0, scale: float = 1.0, clip: float | None = None) -> Tensor:
    """Shift, then scale, then clip: ``clip((r + bias) * scale, -clip, clip)``.

    The order is that of AReaL's code (github.com/inclusionAI/AReaL): ``bias`` is in the reward function's unit,
    ``clip`` in the unit of the result.

    >>> shape_rewards(torch.tensor([0.0, 0.5, 1.0]), bias=-0.5, scale=10.0, clip=4.0)
    tensor([-4.,  0.,  4.])

    Args:
        rewards: ``[B]``, reward of each completion.
        bias: Added first.
        scale: Factor of the sum.
        clip: Largest size of a result; None: no bound.

    Returns:
        ``[B]``, in the dtype of ``rewards``, computed in double precision; carries no gradient.

    Raises:
        ValueError: ``rewards`` is not ``[B]``, or ``clip`` is not positive.
    """
    if rewards.ndim != 1:
        raise ValueError(f"rewards {tuple(rewards.shape)} do not fit; expected [B]")
    if clip is not None and not clip > 0.0:
        raise ValueError(f"clip = {clip}: must be positive, or None for no bound")
    shaped = (rewards.detach().double() + bias) * scale
    return narrow(shaped if clip is None else shaped.clamp(min=-clip, max=clip), rewards.dtype)


def normalize_rewards(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    level: str,
    mean: bool,
    std: bool,
    leave_one_out: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """Remove the mean of the rewards, their standard deviation, or both, over each group or over the batch.

    ``(r - m) / (s + eps)`` with ``m`` the mean (0 when ``mean`` is False) and ``s`` the unbiased standard deviation
    (without ``std`` nothing is divided). With ``leave_one_out``, ``m`` is the mean of the *other* rewards; ``s``
    is still that of all.

    At level ``group`` this holds three methods of :func:`group_advantages`: mean and std are grpo, the mean alone is
    dr_grpo, the mean of the others alone is rloo. At level ``batch`` all rows form one group.

    Rewards without spread (all equal, or a single one) have no scale to remove and are not divided: with ``mean``
    they give exactly 0, without it they stay as they are, rather than grow by ``1 / eps``. A group of one has no
    others, and gives 0 with ``leave_one_out`` too. Results saturate where they are too large for the dtype. What is
    normalized together must lie in one call: rows on other ranks are not seen.

    >>> rewards, group_ids = torch.tensor([1.0, 10.0, 3.0, 30.0]), torch.tensor([0, 1, 0, 1])
    >>> normalize_rewards(rewards, group_ids, level="group", mean=True, std=False)
    tensor([ -1., -10.,   1.,  10.])
    >>> normalize_rewards(rewards, group_ids, level="batch", mean=True, std=False)
    tensor([-10.,  -1.,  -8.,  19.])

    Args:
        rewards: ``[B]``, floating point, reward of each completion.
        group_ids: ``[B]``, any integers in any order; completions of one prompt have the same.
        level: ``group`` or ``batch``: over what mean and standard deviation are taken.
        mean: Subtract the mean.
        std: Divide by the standard deviation.
        leave_one_out: Take the mean over the other rewards; needs ``mean``.
        eps: Added to the standard deviation, in reward.

    Returns:
        ``[B]``, in the dtype of ``rewards``; carries no gradient.

    Raises:
        ValueError: ``level`` is unknown, a shape or a dtype does not fit, ``leave_one_out`` comes without ``mean``,
            or ``eps`` is negative.
    """
    if level not in ("group", "batch"):
        raise ValueError(f"level = {level!r}: use group or batch")
    if leave_one_out and not mean:
        raise ValueError("leave_one_out = True needs mean = True")
    if not eps >= 0.0:
        raise ValueError(f"eps = {eps}: must be 0 or more")
    groups = Groups.of(torch.zeros_like(group_ids) if level == "batch" else group_ids, rewards=rewards)
    x = groups.above_smallest(rewards)
    if leave_one_out:
        normalized = groups.deviations_from_others(x)
    else:
        normalized = groups.deviations(x) if mean else rewards.detach().double()
    if std:
        spread = groups.std(x)
        normalized = normalized / torch.where(spread > 0, spread + eps, 1.0)
    return narrow(normalized, rewards.dtype)


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
