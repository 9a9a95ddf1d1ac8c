"""Per-token rewards and the critic's values -> advantages and returns."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_ray.advantages.padding import blank, checked_mask, widened

__all__ = ["gae", "reinforce_plus_plus", "turn_gae"]

# Of float32 numbers times this nothing is left next to another one, and their quotients by it are finite in float64.
_SMALLEST_POWER = 1e-100


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float,
    critic_lam: float | None = None,
    length_alpha: float | None = None,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Generalized advantage estimation over the unmasked tokens of each row.

    With ``t'`` the next *unmasked* position after ``t``::

        delta_t = r_t + gamma * V_t' - V_t
        A_t     = delta_t + gamma * lam * A_t'
        R_t     = A_t + V_t

    After the last unmasked token ``V_t'`` is ``bootstrap`` and ``A_t'`` is 0. With ``critic_lam``, ``R_t`` is computed
    with that lambda in place of ``lam`` (decoupled GAE, "What's Behind PPO's Collapse in Long-CoT?", arXiv:2503.01491).
    With ``length_alpha``, ``lam`` is that of each row, ``1 - 1 / (length_alpha * l)`` for ``l`` unmasked tokens, and 0
    at least ("VAPO", arXiv:2504.05118, equation 11).

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
        gamma: Discount per token, in [0, 1].
        lam: GAE's lambda, in [0, 1]: 0 gives one-step TD errors, 1 gives return minus value.
        critic_lam: Lambda of the returns, in [0, 1]. None: that of the advantages.
        length_alpha: Makes the lambda of the advantages one of each row's length; above 0. None: ``lam`` for all.
        bootstrap: ``[B]``, value of the state after the last unmasked token: the critic's where the completion
            was truncated, 0 where it finished. None: 0 everywhere.

    Returns:
        Advantages and returns, ``[B, T]`` each, float32 (float64 if an input is), 0 at masked positions.

    Raises:
        ValueError: A shape does not fit, ``gamma`` or a lambda lies outside [0, 1], or ``length_alpha`` is not above 0.
    """
    mask = checked_mask(mask, ndim=2, rewards=rewards, values=values)
    _check_coefficients(gamma=gamma, lam=lam, critic_lam=lam if critic_lam is None else critic_lam)
    if length_alpha is not None and not length_alpha > 0.0:
        raise ValueError(f"length_alpha = {length_alpha}: must be positive")
    rewards, values = blank(rewards.detach(), mask), blank(values.detach(), mask)
    # Unmasked tokens side by side, the last one in column 1, and what follows it in column 0.
    places = (mask.sum(dim=1, keepdim=True) + 1 - mask.cumsum(dim=1)) * mask
    rewards_of, values_of = (
        x.new_zeros(x.shape[0], x.shape[1] + 1, dtype=torch.float64).scatter_(1, places, x.double())
        for x in (rewards, values)
    )
    values_of[:, 0] = _bootstrap_values(bootstrap, values)
    deltas = rewards_of[:, 1:].add_(values_of[:, :-1], alpha=gamma).sub_(values_of[:, 1:])

    def summed(factor: float | Tensor) -> Tensor:
        sums = _sums_by_row(deltas, factor) if isinstance(factor, Tensor) else _discounted_sums(deltas, factor)
        return blank(sums.gather(1, (places - 1).clamp_(min=0)).to(values.dtype), mask)

    of_policy: float | Tensor = gamma * lam
    if length_alpha is not None:
        lengths = mask.sum(dim=1).clamp(min=1).double()
        of_policy = gamma * (1.0 - 1.0 / (length_alpha * lengths)).clamp_(min=0.0)
    advantages = summed(of_policy)
    # One pass where both are of the same lambda.
    is_same = length_alpha is None and critic_lam in (None, lam)
    of_critic = advantages if is_same else summed(of_policy if critic_lam is None else gamma * critic_lam)
    return advantages, of_critic + values


def turn_gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    turn_ids: Tensor,
    *,
    gamma: float,
    lam: float,
    critic_lam: float | None = None,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Generalized advantage estimation with one step per turn instead of one per token.

    With ``r_k`` the sum of the rewards of turn ``k``'s unmasked tokens, ``V_k`` the value at the first of them, and
    ``k'`` the next turn that has any::

        delta_k = r_k + gamma * V_k' - V_k
        A_k     = delta_k + gamma * lam * A_k'
        R_k     = A_k + V_k

    Each unmasked token has the advantage ``A_k`` and the return ``R_k`` of its turn. So a critic is drawn to the turn's
    return at all of its tokens, though only its value at the first one is read: before a turn it predicts what the rest
    of the trajectory brings, and within the turn it predicts the same with more tokens of it to go by.

    "High-Dimensional Continuous Control Using Generalized Advantage Estimation" (arXiv:1506.02438), with a whole turn
    as the action. For turns of one token it is :func:`gae`; of a finished trajectory with a single turn the advantage
    is reward minus first value. Rewards at masked positions are ignored. The results carry no gradient.

    >>> rewards = torch.tensor([[0.0, 0.25, 0.0, 1.0]])
    >>> values = torch.tensor([[0.5, 9.0, 0.5, 9.0]])
    >>> turn_ids = torch.tensor([[0, 0, 1, 1]])
    >>> advantages, returns = turn_gae(rewards, values, torch.ones(1, 4), turn_ids, gamma=1.0, lam=0.5)
    >>> advantages, returns
    (tensor([[0.5000, 0.5000, 0.5000, 0.5000]]), tensor([[1., 1., 1., 1.]]))

    Args:
        rewards: ``[B, T]``, reward of each token.
        values: ``[B, T]``, the critic's value of the state in which each token was chosen.
        mask: ``[B, T]``, True where a token was chosen by the policy.
        turn_ids: ``[B, T]`` integers, the number of each token's turn, from 0, ascending along a row; not read where
            masked.
        gamma: Discount per turn, in [0, 1].
        lam: GAE's lambda per turn, in [0, 1].
        critic_lam: Lambda of the returns, in [0, 1]. None: ``lam``.
        bootstrap: ``[B]``, value of the state after the last turn: the critic's where the trajectory was truncated, 0
            where it finished. None: 0 everywhere.

    Returns:
        Advantages and returns, ``[B, T]`` each, float32 (float64 if ``values`` are), 0 at masked positions.

    Raises:
        ValueError: A shape does not fit, or ``gamma`` or ``lam`` lies outside [0, 1].
    """
    mask = checked_mask(mask, ndim=2, rewards=rewards, values=values, turn_ids=turn_ids)
    rewards, values = blank(rewards.detach(), mask), blank(values.detach(), mask)
    rows, width = mask.shape
    turn_of = turn_ids.long().masked_fill(~mask, 0)
    count = int(turn_of.max()) + 1 if turn_of.numel() else 0
    columns = torch.arange(width, device=mask.device).expand(rows, width).masked_fill(~mask, width)
    first = columns.new_full((rows, count), width).scatter_reduce_(1, turn_of, columns, "amin")
    turn_rewards = rewards.new_zeros(rows, count, dtype=torch.float64).scatter_add_(1, turn_of, rewards.double())
    turn_values = values.gather(1, first.clamp(max=max(width - 1, 0)))
    is_turn = first < width
    of_turns = gae(turn_rewards, turn_values, is_turn, gamma=gamma, lam=lam, critic_lam=critic_lam, bootstrap=bootstrap)
    advantages, returns = (blank(x.gather(1, turn_of), mask) for x in of_turns)
    return advantages, returns


def reinforce_plus_plus(rewards: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    r"""Sum the rewards from each unmasked token to the end of its row.

    With ``t'`` the next *unmasked* position after ``t``, and 0 after the last::

        A_t = r_t + gamma * A_t'

    "REINFORCE++" (arXiv:2501.03262). With ``gamma = 1`` and rewards from :func:`kl_penalized_rewards` this is the
    paper's ``reward - coef * sum_(i >= t) kl_i``. It is :func:`gae` with lambda 1 and no critic, and computed as
    that: a masked position is not a step, neither discounted through nor counted, and a reward there is ignored.

    The paper then normalizes over all tokens of the batch. That is left to :func:`whiten`. The paper's form with a
    group baseline has nothing to sum up: it is :func:`group_advantages` with ``method="dr_grpo"``, repeated for
    every token and whitened the same way.

    >>> rewards = torch.tensor([[-0.5, 9.0, 1.0]])
    >>> reinforce_plus_plus(rewards, torch.tensor([[1, 0, 1]]), gamma=0.5)
    tensor([[0., 0., 1.]])

    Args:
        rewards: ``[B, T]``, reward of each token, the penalty for KL included.
        mask: ``[B, T]``, True where a token was chosen by the policy.
        gamma: Discount per token, in [0, 1].

    Returns:
        ``[B, T]`` float32 (float64 if ``rewards`` are), 0 at masked positions; carries no gradient.

    Raises:
        ValueError: The shapes do not fit, or ``gamma`` lies outside [0, 1].
    """
    mask = checked_mask(mask, ndim=2, rewards=rewards)
    advantages, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0)
    return advantages


def _discounted_sums(x: Tensor, factor: float) -> Tensor:
    """``y_t = x_t + factor * y_(t-1)`` along rows of ``[B, T]`` float64, by as many kernels whatever T is.

    A running sum of ``x_t / factor^t``, multiplied by ``factor^t``: as exact as the recursion while the powers are
    numbers. So it restarts where they get too small, and what lies further back than one restart no longer counts.
    """
    if factor == 0.0 or x.numel() == 0:
        return x
    width = x.shape[1]
    block = width if factor == 1.0 else min(width, max(1, int(math.log(_SMALLEST_POWER) / math.log(factor))))
    powers = factor ** torch.arange(block, dtype=x.dtype, device=x.device)
    blocks = torch.nn.functional.pad(x, (0, -width % block)).unflatten(1, (-1, block))
    sums = (blocks / powers).cumsum_(dim=2).mul_(powers)
    sums[:, 1:] += sums[:, :-1, -1:] * (factor * powers)
    return sums.flatten(1)[:, :width]


def _sums_by_row(x: Tensor, factors: Tensor) -> Tensor:
    """As :func:`_discounted_sums`, with a factor of each row: ``[B]``."""
    sums = torch.empty_like(x)
    for factor in factors.unique().tolist():
        rows = factors == factor
        sums[rows] = _discounted_sums(x[rows], factor)
    return sums


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
