"""Stage 4 of the loop: per-token rewards and the critic's values -> advantages and returns."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ray.advantages.padding import blank, checked_mask, widened

__all__ = ["gae"]


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Generalized advantage estimation over the unmasked tokens of each row.

    With ``t'`` the next *unmasked* position after ``t``::

        delta_t = r_t + gamma * V_t' - V_t
        A_t     = delta_t + gamma * lam * A_t'
        R_t     = A_t + V_t

    After the last unmasked token ``V_t'`` is ``bootstrap`` and ``A_t'`` is 0.

    "High-Dimensional Continuous Control Using Generalized Advantage Estimation" (arXiv:1506.02438). Where we
    differ: a masked position (padding, or tool output in the middle of a row) is not a step at all. It is
    neither discounted through nor counted, and a reward that lies there is ignored.

    Nothing is whitened here (:func:`whiten` does that), and the results carry no gradient: they are targets.

    >>> rewards = torch.tensor([[0.0, 0.0, 1.0]])
    >>> values = torch.tensor([[0.25, 0.5, 0.5]])
    >>> advantages, returns = gae(rewards, values, torch.ones(1, 3), gamma=1.0, lam=0.5)
    >>> advantages, returns
    (tensor([[0.3750, 0.2500, 0.5000]]), tensor([[0.6250, 0.7500, 1.0000]]))

    Args:
        rewards: ``[B, T]``, reward of each token.
        values: ``[B, T]``, the critic's value of the state in which each token was chosen.
        mask: ``[B, T]``, True where a token was chosen by the policy.
        gamma: Discount a token, in [0, 1].
        lam: GAE's lambda, in [0, 1]: 0 gives one-step TD errors, 1 gives return minus value.
        bootstrap: ``[B]``, value of the state after the last unmasked token: the critic's where the completion
            was truncated, 0 where it finished. None: 0 everywhere.

    Returns:
        Advantages and returns, ``[B, T]`` each, float32 (float64 if an input is), 0 at masked positions.

    Raises:
        ValueError: A shape does not fit, or ``gamma`` or ``lam`` lies outside [0, 1].
    """
    mask = checked_mask(mask, ndim=2, rewards=rewards, values=values)
    _check_coefficients(gamma=gamma, lam=lam)
    rewards, values = blank(rewards.detach(), mask), blank(values.detach(), mask)
    next_values = _bootstrap_values(bootstrap, values)
    next_advantages = torch.zeros_like(next_values)
    columns = []
    for reward, value, real in reversed(list(zip(rewards.unbind(1), values.unbind(1), mask.unbind(1), strict=True))):
        step = reward + gamma * next_values - value + gamma * lam * next_advantages
        next_advantages = torch.where(real, step, next_advantages)
        next_values = torch.where(real, value, next_values)
        columns.append(next_advantages)
    advantages = blank(torch.stack(columns[::-1], dim=1), mask) if columns else torch.zeros_like(values)
    return advantages, advantages + values


def _check_coefficients(**coefficients: float) -> None:
    for name, coefficient in coefficients.items():
        if not 0.0 <= coefficient <= 1.0:
            raise ValueError(f"{name} = {coefficient}: must lie in [0, 1]")


def _bootstrap_values(bootstrap: Tensor | None, values: Tensor) -> Tensor:
    if bootstrap is None:
        return values.new_zeros(values.shape[0])
    if bootstrap.shape != values.shape[:1]:
        raise ValueError(f"bootstrap {tuple(bootstrap.shape)} does not fit values {tuple(values.shape)}; expected [B]")
    return widened(bootstrap.detach()).to(values.device)
