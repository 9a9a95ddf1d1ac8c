"""Rewards and those of greedy completions of the same prompts -> one advantage per completion."""

from __future__ import annotations

from torch import Tensor

from rlhf_ray.advantages.groups import narrow

__all__ = ["remax"]


def remax(rewards: Tensor, greedy_rewards: Tensor) -> Tensor:
    """Subtract the reward of the greedily decoded completion of the same prompt: ``A = R - R_greedy``.

    "ReMax: A Simple, Effective, and Efficient Reinforcement Learning Method for Aligning Large Language Models"
    (arXiv:2310.10505). The baseline does not depend on the sampled completion, so it leaves the gradient unbiased.

    >>> import torch
    >>> remax(torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0.5, 0.5, 0.0]))
    tensor([ 0.5000, -0.5000,  0.5000])

    Args:
        rewards: ``[B]``, reward of each completion.
        greedy_rewards: ``[B]``, reward of the greedy completion of its prompt, on the same scale.

    Returns:
        ``[B]``, in the dtype of ``rewards``; carries no gradient.

    Raises:
        ValueError: The shapes differ, or are not ``[B]``.
    """
    if rewards.ndim != 1 or rewards.shape != greedy_rewards.shape:
        shapes = f"rewards {tuple(rewards.shape)}, greedy_rewards {tuple(greedy_rewards.shape)}"
        raise ValueError(f"shapes do not fit: {shapes}; expected [B] and [B]")
    return narrow(rewards.detach().double() - greedy_rewards.detach().double(), rewards.dtype)
