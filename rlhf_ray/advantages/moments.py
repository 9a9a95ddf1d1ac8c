"""Mean and variance of tokens that lie on several ranks, merged without moving the tokens, and what is made of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_ray.advantages.padding import blank, checked_mask

__all__ = ["Moments", "explained_variance", "whiten"]

FLOAT32_NOISE = 1e-6
"""Relative size below which a spread is rounding of float32 numbers, with a margin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Count, mean and squared deviations of a set of numbers, in double precision.

    ``a + b`` are the moments of both sets together, by the pairwise update of Chan, Golub and LeVeque ("Updating
    Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979)::

        mean = mean_a + d * n_b / n,   m2 = m2_a + m2_b + d^2 * n_a * n_b / n,   d = mean_b - mean_a

    which does not cancel as the difference of a sum of squares and a squared sum does. ``Moments()`` is the empty
    set, so ``sum(parts, Moments())`` merges any number of parts.

    >>> x = torch.tensor([1.0, 2.0, 3.0, 6.0])
    >>> everything = torch.ones(4, dtype=torch.bool)
    >>> halves = [Moments.of(half, everything[:2]) for half in x.split(2)]
    >>> sum(halves, Moments()) == Moments.of(x, everything) == Moments(count=4, mean=3.0, m2=14.0)
    True
    """

    count: float = 0.0
    """How many numbers."""
    mean: float = 0.0
    """Their mean; 0 when there are none."""
    m2: float = 0.0
    """Sum of their squared deviations from the mean."""

    @classmethod
    def of(cls, x: Tensor, mask: Tensor) -> Moments:
        """Measure the unmasked numbers of ``x``.

        Args:
            x: Any shape.
            mask: The same shape, True where a number counts.

        Returns:
            The moments; those of the empty set when everything is masked.

        Raises:
            ValueError: The shapes differ.
        """
        numbers = x.detach()[checked_mask(mask, x=x)].double()
        if numbers.numel() == 0:
            return cls()
        mean = numbers.mean()
        # Read at once: each number would make the host wait for the device.
        of_all, m2 = torch.stack([mean, (numbers - mean).square().sum()]).tolist()
        return cls(count=float(numbers.numel()), mean=of_all, m2=m2)

    def __add__(self, other: Moments) -> Moments:
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        delta = other.mean - self.mean
        return Moments(
            count=count,
            mean=self.mean + delta * other.count / count,
            m2=self.m2 + other.m2 + delta**2 * self.count * other.count / count,
        )

    def variance(self, *, unbiased: bool = True) -> float:
        """Return ``m2 / (count - 1)``, or ``m2 / count`` when not ``unbiased``; 0 where that is undefined."""
        degrees = self.count - 1.0 if unbiased else self.count
        return self.m2 / degrees if degrees > 0.0 else 0.0


def whiten(
    x: Tensor,
    mask: Tensor,
    *,
    unbiased: bool = True,
    eps: float = 1e-8,
    moments: Moments | None = None,
) -> Tensor:
    """Shift and scale the unmasked numbers to mean 0 and standard deviation 1.

    ``(x - mean) / sqrt(variance + eps)``, over all unmasked numbers of the tensor, or of the batch of which the
    tensor is a shard when ``moments`` are given: shards whitened with merged moments equal the whole whitened at
    once. Mean and variance are constants to the gradient.

    >>> import torch
    >>> whiten(torch.tensor([[1.0, 2.0, 3.0, 99.0]]), torch.tensor([[1, 1, 1, 0]]))
    tensor([[-1.,  0.,  1.,  0.]])

    Args:
        x: Any shape.
        mask: The same shape, True where a number counts.
        unbiased: Divide the squared deviations by ``count - 1`` rather than by ``count``.
        eps: Added to the variance, so that equal numbers give 0 rather than NaN.
        moments: Mean and variance to use; None: those of ``x`` itself.

    Returns:
        The same shape and dtype, computed in double precision, 0 at masked positions.

    Raises:
        ValueError: The shapes differ.
    """
    mask = checked_mask(mask, x=x)
    if moments is None:
        moments = Moments.of(x, mask)
    scale = (moments.variance(unbiased=unbiased) + eps) ** -0.5
    # In double precision, or a mean that is large next to the spread would eat the digits.
    whitened = (blank(x, mask).double() - moments.mean) * scale
    return blank(whitened, mask).to(x.dtype)


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
