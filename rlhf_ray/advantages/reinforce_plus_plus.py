"""Per-token rewards -> reward-to-go, the advantages of REINFORCE++ before whitening."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ray.advantages.gae import gae
from rlhf_ray.advantages.padding import checked_mask

__all__ = ["reinforce_plus_plus"]


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
