"""The probability ratio of two policies, from log-probabilities, without overflow."""

from __future__ import annotations

from torch import Tensor

from rlhf_ray.advantages.padding import widened

__all__ = ["MAX_LOG_RATIO", "log_difference", "probability_ratio"]

MAX_LOG_RATIO = 20.0
"""Largest log-ratio, in nats, that is exponentiated.

``exp(20)`` is about 4.9e8: far outside every clip range, so that the bound never touches a healthy update, and
far inside float32, so that products and sums over a batch stay finite (``exp(89)`` is already infinite). There
is no lower bound, since ``exp`` goes to 0 by itself and its gradient with it. Beyond the bound the gradient is 0.
"""

_FINITE = 1e30
"""Far beyond every log-ratio, and small enough that a sum over a sequence stays finite."""


def log_difference(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Return ``logprobs - old_logprobs`` for formulas that sum it over a sequence and bound the sum.

    A bound on each token would change the sum: of +30 and -30 the sum is 0, of +20 and -30 it is -10.

    Args:
        logprobs: Log-probabilities in nats, any shape.
        old_logprobs: Log-probabilities of the denominator's policy, the same shape.

    Returns:
        The log-ratio in nats, the same shape, float32 (float64 if an input is); at most 1e30, so that infinities of
        both signs do not sum to NaN.
    """
    return (widened(logprobs) - widened(old_logprobs)).clamp(max=_FINITE)


def probability_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Return ``exp(min(logprobs - old_logprobs, MAX_LOG_RATIO))``.

    Args:
        logprobs: Log-probabilities in nats, any shape.
        old_logprobs: Log-probabilities of the denominator's policy, the same shape.

    Returns:
        The ratio, the same shape, float32 (float64 if an input is); exactly 1 where both are equal, never infinite.
    """
    return log_difference(logprobs, old_logprobs).clamp(max=MAX_LOG_RATIO).exp()
