"""Per-token estimates of the KL divergence from the reference policy."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ray.advantages.padding import widened
from rlhf_ray.advantages.ratio import MAX_LOG_RATIO

__all__ = ["kl"]


def kl(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str) -> Tensor:
    """Estimate ``KL(policy || reference)`` at each token from the sampled token alone.

    With ``d = logprobs - ref_logprobs`` of tokens sampled from the policy:

    ========= ======================= =====================================================================
    k1        ``d``                   unbiased, high variance, may be negative
    k2        ``d^2 / 2``             biased, low variance, never negative
    k3        ``exp(-d) - 1 + d``     unbiased, low variance, never negative
    abs       ``|d|``                 not a KL estimate; a distance that bounds k1 from above
    ========= ======================= =====================================================================

    John Schulman, "Approximating KL divergence" (joschu.net/blog/kl-approx.html). "Unbiased" is a statement about
    the value. These formulas are for measuring and for rewards; their derivatives are not in general those of the
    KL, see :func:`rlhf_ray.losses.kl_loss`. The exponent of k3 is bounded by
    :data:`~rlhf_ray.advantages.ratio.MAX_LOG_RATIO`, so k3 stays finite where the reference gives a token far
    more probability than the policy. Finite is not small: at ``d = -8`` k3 is 2,972 where k1 is -8 and k2 is 32, and as
    a reward one such token outweighs a batch. ``training.kl_clip`` bounds estimates in the reward.

    >>> policy, reference = torch.tensor([0.5, 0.25]).log(), torch.tensor([0.25, 0.5]).log()
    >>> kl(policy, reference, estimator="k1")
    tensor([ 0.6931, -0.6931])
    >>> kl(policy, reference, estimator="k3")
    tensor([0.1931, 0.3069])

    Args:
        logprobs: Log-probabilities of the sampled tokens under the policy, in nats, any shape.
        ref_logprobs: The same tokens under the reference, the same shape.
        estimator: ``k1``, ``k2``, ``k3`` or ``abs``.

    Returns:
        One estimate per token, in nats, the same shape, float32 (float64 if an input is). Nothing is masked: what lies
        under padding stays there.

    Raises:
        ValueError: The shapes differ, or the estimator is unknown.
    """
    if logprobs.shape != ref_logprobs.shape:
        shapes = f"logprobs {tuple(logprobs.shape)}, ref_logprobs {tuple(ref_logprobs.shape)}"
        raise ValueError(f"shapes differ: {shapes}")
    difference = widened(logprobs) - widened(ref_logprobs)
    match estimator:
        case "k1":
            return difference
        case "k2":
            return 0.5 * difference.square()
        case "k3":
            return _k3((-difference).clamp(max=MAX_LOG_RATIO))
        case "abs":
            return difference.abs()
    raise ValueError(f"unknown KL estimator {estimator!r}; use k1, k2, k3 or abs")


def _k3(log_ratio: Tensor) -> Tensor:
    # expm1 keeps the digits of nearby policies, where exp(x) - 1 would cancel. It may be off by its last digit
    # (CUDA promises 1 ulp), which near 0 could carry the difference below 0.
    return (torch.expm1(log_ratio) - log_ratio).clamp(min=0.0)
