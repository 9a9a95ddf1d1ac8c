"""Rewards of several completions of one prompt -> one advantage per completion, without a critic."""

from __future__ import annotations

from torch import Tensor

from rlhf_ray.advantages.groups import Groups, narrow, quotient

__all__ = ["group_advantages", "remax"]


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    method: str,
    lengths: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    r"""Compare each completion's reward with those of the other completions of its prompt.

    With ``mean`` and ``std`` over the ``n`` rewards ``r`` of a group, and ``l`` the completions' lengths:

    ========= ==================================== ==========================================================
    grpo      ``(r - mean) / (std + eps)``         DeepSeekMath (arXiv:2402.03300); ``std`` divides by n - 1
    dr_grpo   ``r - mean``                         "Understanding R1-Zero-Like Training" (arXiv:2503.20783)
    rloo      ``r - mean of the n - 1 others``     "Back to Basics" (arXiv:2402.14740)
    opo       ``r - sum(l * r) / sum(l)``          "On-Policy RL with Optimal Reward Baseline" (arXiv:2505.23585)
    maxrl     ``(r - mean) / mean``                "Maximum Likelihood Reinforcement Learning" (arXiv:2602.02710)
    ========= ==================================== ==========================================================

    rloo is dr_grpo times ``n / (n - 1)``. opo's baseline has the least variance if the squared gradient of a
    completion is proportional to its length. maxrl is derived for rewards 0 and 1, where the advantages of a group
    follow the gradient of the log of its success rate; for other rewards of 0 or more it is the same formula without
    that meaning, and negative ones are refused, since the mean could change sign. Where the mean is 0 nothing
    succeeded and the result is 0.

    What gives 0, whatever the method:

    - a group of one: there is nothing to compare with (no other for rloo, no unbiased ``std`` for grpo);
    - a group of equal rewards, exactly, in any precision;
    - for opo, a group without tokens.

    The result is finite for finite rewards (float64: up to 1e150 in size), and saturates where a difference is too
    large for the dtype. A group must lie in one call as a whole: rows on other ranks are not seen.

    Two further estimators need no method of their own. The baseline form of REINFORCE++ (arXiv:2501.03262) is
    ``dr_grpo``, repeated for every token of the completion and then whitened over the batch by :func:`whiten`.
    ReMax (arXiv:2310.10505) subtracts the reward of a greedily decoded completion of the same prompt: plainly
    ``rewards - greedy_rewards``.

    >>> import torch
    >>> rewards, group_ids = torch.tensor([1.0, 5.0, 0.0, 5.0, 2.0]), torch.tensor([4, 9, 4, 9, 4])
    >>> group_advantages(rewards, group_ids, method="dr_grpo")
    tensor([ 0.,  0., -1.,  0.,  1.])
    >>> group_advantages(rewards, group_ids, method="rloo")
    tensor([ 0.0000,  0.0000, -1.5000,  0.0000,  1.5000])

    Args:
        rewards: ``[B]``, floating point, reward of each completion.
        group_ids: ``[B]``, any integers in any order; completions of one prompt have the same. Groups may differ in
            size.
        method: ``grpo``, ``dr_grpo``, ``rloo``, ``opo`` or ``maxrl``.
        lengths: ``[B]``, tokens of each completion, 0 or more. Only opo needs them; the others ignore them.
        eps: Added to grpo's standard deviation, in reward.

    Returns:
        ``[B]``, in the dtype of ``rewards``; carries no gradient.

    Raises:
        ValueError: ``method`` is unknown, a shape or a dtype does not fit, ``lengths`` are missing or negative,
            ``rewards`` are negative for maxrl, or ``eps`` is negative.
    """
    groups = Groups.of(group_ids, rewards=rewards)
    if not eps >= 0.0:
        raise ValueError(f"eps = {eps}: must be 0 or more")
    # Every formula but maxrl's denominator is the same wherever rewards are counted from.
    x = groups.above_smallest(rewards)
    match method:
        case "grpo":
            advantages = quotient(groups.deviations(x), groups.std(x) + eps)
        case "dr_grpo":
            advantages = groups.deviations(x)
        case "rloo":
            advantages = groups.deviations_from_others(x)
        case "opo":
            advantages = _opo(x, groups, lengths)
        case "maxrl":
            advantages = _maxrl(x, groups, rewards)
        case _:
            raise ValueError(f"method = {method!r}: use grpo, dr_grpo, rloo, opo or maxrl")
    return narrow(advantages, rewards.dtype)


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


def _opo(x: Tensor, groups: Groups, lengths: Tensor | None) -> Tensor:
    if lengths is None:
        raise ValueError("method = 'opo' needs lengths")
    if lengths.shape != x.shape:
        raise ValueError(f"lengths {tuple(lengths.shape)} do not fit rewards {tuple(x.shape)}; expected [B]")
    if (lengths < 0).any():
        raise ValueError(f"lengths hold {lengths.min().item()}; they must be 0 or more")
    weights = lengths.detach().to(x)
    total = groups.total(weights)
    # One fraction rather than x less a fraction, so that a group without tokens gives 0.
    return quotient(x * total - groups.total(weights * x), total)


def _maxrl(x: Tensor, groups: Groups, rewards: Tensor) -> Tensor:
    if (rewards < 0).any():
        raise ValueError(f"rewards hold {rewards.min().item()}; method = 'maxrl' needs rewards of 0 or more")
    return quotient(groups.deviations(x), groups.total(rewards.detach().double()) / groups.size)
