"""Adds up a rank's metrics over microbatches and merges them over ranks into the figures of one update."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist

__all__ = ["MetricSums"]


class MetricSums:
    """Token-weighted means, maxima, and losses an optimizer step.

    ``add`` takes means over a microbatch's tokens and their number, ``add_loss`` a microbatch's share of a loss;
    ``merge`` returns means over all tokens of all ranks, so the figures do not depend on how the batch was split.
    Tensors stay on their device until then: reading each would make the host wait for the device.
    """

    def __init__(self) -> None:
        self._unread: list[tuple[str, torch.Tensor, float | None]] = []
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._weights: defaultdict[str, float] = defaultdict(float)
        self._losses: defaultdict[str, float] = defaultdict(float)
        self._maxima: dict[str, float] = {}

    def add_loss(self, name: str, value: torch.Tensor) -> None:
        """Add a microbatch's share of a loss that was divided by its minibatch's global denominator."""
        self._unread.append((name, value.detach(), None))

    def add(self, means: Mapping[str, float | torch.Tensor], weight: float) -> None:
        """Add means that stand for ``weight`` tokens; names ending in ``_max`` are combined by the maximum."""
        if weight == 0:
            return
        for name, value in means.items():
            if isinstance(value, torch.Tensor):
                self._unread.append((name, value.detach(), weight))
            else:
                self._count(name, value, weight)

    def merge(self, num_steps: int, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """Combine over ranks; every rank gets the result. Losses are means over ``num_steps`` optimizer steps.

        ``group`` has a rank for each share of the batch; ``None``: all ranks do.
        """
        for (name, _, weight), value in zip(self._unread, _read([one for _, one, _ in self._unread]), strict=True):
            self._count(name, value, weight)
        self._unread = []
        parts: list[MetricSums] = [self] * dist.get_world_size(group)
        dist.all_gather_object(parts, self, group=group)
        merged: dict[str, float] = {}
        for name in {name for part in parts for name in part._maxima}:
            merged[name] = _largest(*(part._maxima[name] for part in parts if name in part._maxima))
        for name in {name for part in parts for name in part._losses}:
            merged[name] = sum(part._losses[name] for part in parts) / num_steps
        for name in {name for part in parts for name in part._sums}:
            merged[name] = sum(part._sums[name] for part in parts) / sum(part._weights[name] for part in parts)
        return merged

    def _count(self, name: str, value: float, weight: float | None) -> None:
        if weight is None:
            self._losses[name] += value
        elif name.endswith("_max"):
            self._maxima[name] = _largest(self._maxima.get(name, float("-inf")), value)
        else:
            self._sums[name] += value * weight
            self._weights[name] += weight


def _read(scalars: Sequence[torch.Tensor]) -> list[float]:
    """Numbers of scalar tensors: one wait for each dtype and device among them."""
    numbers = [0.0] * len(scalars)
    alike: defaultdict[tuple[torch.dtype, torch.device], list[int]] = defaultdict(list)
    for index, scalar in enumerate(scalars):
        alike[scalar.dtype, scalar.device].append(index)
    for indices in alike.values():
        for index, number in zip(indices, torch.stack([scalars[index] for index in indices]).tolist(), strict=True):
            numbers[index] = float(number)
    return numbers


def _largest(*values: float) -> float:
    """The maximum, NaN where one of them is: Python's own depends on their order."""
    return float(np.max(values))
