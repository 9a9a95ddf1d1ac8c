"""How well the critic predicts the returns, as one number for the reports."""

from __future__ import annotations

from rlhf_ray.advantages.moments import Moments

__all__ = ["explained_variance"]

FLOAT32_NOISE = 1e-6
"""Relative size below which a spread is rounding of float32 numbers, with a margin."""


def explained_variance(returns: Moments, residuals: Moments) -> float:
    """Return ``1 - var(returns - values) / var(returns)``.

    1 for a perfect critic, 0 for one that knows no more than a constant, negative for a worse one. Moments of
    shards are merged with ``+`` before the call, so the result covers every token of every rank.

    Where the returns do not vary there is nothing to explain and the ratio is undefined: the result is 0.0. "Do
    not vary" means a spread below float32 rounding of the numbers involved, ``var(returns) <= (1e-6)^2 *
    (mean(returns)^2 + mean((returns - values)^2))``; without that, equal returns that went through float32
    arithmetic would report minus 1e13.

    >>> explained_variance(Moments(count=4, mean=1.0, m2=8.0), Moments(count=4, mean=0.0, m2=2.0))
    0.75

    Args:
        returns: Moments of the returns over unmasked tokens.
        residuals: Moments of ``returns - values`` over the same tokens.

    Returns:
        The explained variance, at most 1.

    Raises:
        ValueError: The two do not count the same number of tokens.
    """
    if returns.count != residuals.count:
        raise ValueError(f"returns count {returns.count} tokens, residuals {residuals.count}")
    total, left = returns.variance(unbiased=False), residuals.variance(unbiased=False)
    if total <= FLOAT32_NOISE**2 * (returns.mean**2 + residuals.mean**2 + left):
        return 0.0
    return 1.0 - left / total
