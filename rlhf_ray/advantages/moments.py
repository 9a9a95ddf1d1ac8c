"""Mean and variance of tokens that lie on several ranks, merged without moving the tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_ray.advantages.padding import checked_mask

__all__ = ["Moments"]


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
