"""Which completions share a prompt, and sums over each group.

The formulas ask for two things that plain sums do not give. Rewards that are all equal must have deviations of
exactly 0, though the mean of three times 0.1 is not 0.1; so rewards are counted from the smallest of their group,
in double precision. And nothing may become 0 / 0; so divisions go through :func:`quotient`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Groups", "narrow", "quotient"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """The rows of a batch, sorted into groups; every method gives each row the result of its own group.

    >>> groups = Groups.of(torch.tensor([7, 3, 7]), rewards=torch.tensor([1.0, 5.0, 3.0]))
    >>> groups.size
    tensor([2., 1., 2.], dtype=torch.float64)
    >>> groups.total(torch.tensor([1.0, 5.0, 3.0]).double())
    tensor([4., 5., 4.], dtype=torch.float64)
    """

    index: Tensor
    """``[B]``, int64: number of each row's group, from 0."""
    size: Tensor
    """``[B]``, float64: how many rows each row's group has, itself included."""
    count: int
    """How many groups."""

    @classmethod
    def of(cls, group_ids: Tensor, *, rewards: Tensor) -> Groups:
        """Check ids and rewards, and sort the rows into groups.

        Args:
            group_ids: ``[B]``, any integers in any order; equal ones belong together.
            rewards: ``[B]``, floating point; only its shape and dtype are looked at.

        Raises:
            ValueError: A shape or a dtype does not fit.
        """
        if rewards.ndim != 1 or group_ids.shape != rewards.shape:
            shapes = f"rewards {tuple(rewards.shape)}, group_ids {tuple(group_ids.shape)}"
            raise ValueError(f"shapes do not fit: {shapes}; expected [B] and [B]")
        if not rewards.is_floating_point():
            raise ValueError(f"rewards are {rewards.dtype}; expected floating point")
        if group_ids.is_floating_point() or group_ids.is_complex():
            raise ValueError(f"group_ids are {group_ids.dtype}; expected integers")
        _, index, sizes = torch.unique(group_ids, return_inverse=True, return_counts=True)
        return cls(index=index, size=sizes[index].double(), count=len(sizes))

    def total(self, x: Tensor) -> Tensor:
        """Sum ``x`` (``[B]``) over each row's group."""
        return x.new_zeros(self.count).index_add_(0, self.index, x)[self.index]

    def above_smallest(self, rewards: Tensor) -> Tensor:
        """Return ``[B]`` float64, rewards less the smallest of the group: exactly 0 where all are equal."""
        x = rewards.detach().double()
        smallest = x.new_zeros(self.count).scatter_reduce_(0, self.index, x, "amin", include_self=False)
        return x - smallest[self.index]

    def deviations(self, x: Tensor) -> Tensor:
        """Return ``[B]``, ``x`` less the mean of the group."""
        return x - self.total(x) / self.size

    def deviations_from_others(self, x: Tensor) -> Tensor:
        """Return ``[B]``, ``x`` less the mean of the *other* rows of the group; 0 in a group of one."""
        # x - (sum - x) / (n - 1) = (x - sum / n) * n / (n - 1)
        return quotient(self.deviations(x) * self.size, self.size - 1)

    def std(self, x: Tensor) -> Tensor:
        """Return ``[B]``, the unbiased standard deviation of the group; 0 in a group of one, which has none."""
        return (self.total(self.deviations(x).square()) / (self.size - 1).clamp(min=1)).sqrt()


def quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide; 0 where the denominator is 0."""
    return (numerator / denominator).masked_fill(denominator == 0, 0.0)


def narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return double-precision ``x`` in ``dtype``; what is too large for it becomes its largest number, not infinity.

    float32 where ``dtype`` is not a floating-point type.
    """
    dtype = dtype if dtype.is_floating_point else torch.float32
    limits = torch.finfo(dtype)
    return x.clamp(min=limits.min, max=limits.max).to(dtype)
