"""Adds up a rank's metrics over microbatches, on its device, and merges them over ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist

from rlhf_ray.learner.mesh import gather_objects

__all__ = ["MetricSums"]


class MetricSums:
    """Token-weighted means, maxima, and losses per optimizer step.

    ``add`` takes means over a microbatch's tokens and their number, ``add_loss`` a microbatch's share of a loss;
    ``merge`` returns means over all tokens of all ranks, so they do not depend on how the batch was split. Sums stay on
    their device until then: reading one would make the host wait for the device.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._maxima: dict[str, torch.Tensor] = {}
        self._weights: defaultdict[str, float] = defaultdict(float)
        """Tokens behind the sum of a mean; a loss has none."""

    def add_loss(self, name: str, value: torch.Tensor) -> None:
        """Add a microbatch's share of a loss that was divided by its minibatch's global denominator."""
        self._sums[name] = value.detach().double() + self._sums.get(name, 0.0)

    def add(self, means: Mapping[str, float | torch.Tensor], weight: float) -> None:
        """Add means over ``weight`` tokens; names ending in ``_max`` are combined by the maximum."""
        if weight == 0:
            return
        for name, value in means.items():
            number = torch.as_tensor(value, dtype=torch.float64).detach()
            if name.endswith("_max"):
                self._maxima[name] = torch.maximum(number, self._maxima.get(name, number))
            else:
                self._sums[name] = number * weight + self._sums.get(name, 0.0)
                self._weights[name] += weight

    def merge(
        self, num_steps: int, group: dist.ProcessGroup | None = None, *, of_losses: Mapping[str, int] | None = None
    ) -> dict[str, float]:
        """Combine over ranks; every rank gets the result.

        Args:
            num_steps: Optimizer steps, over which losses are means.
            group: Has a rank for each share of the batch; ``None``: all ranks do.
            of_losses: Names of losses with another number of steps.
        """
        read = _read(self._sums | self._maxima)
        parts = gather_objects((read, dict(self._weights)), group)
        merged: dict[str, float] = {}
        for name in {name for numbers, _ in parts for name in numbers}:
            numbers = [own[name] for own, _ in parts if name in own]
            weight = sum(weights.get(name, 0.0) for _, weights in parts)
            if name.endswith("_max"):
                merged[name] = float(np.max(numbers))  # NaN where one is: Python's own depends on their order.
            else:
                merged[name] = sum(numbers) / (weight or (of_losses or {}).get(name, num_steps))
        return merged


def _read(scalars: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Numbers of scalar tensors, with one wait per device."""
    by_device: defaultdict[torch.device, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, scalar in scalars.items():
        by_device[scalar.device][name] = scalar
    read: dict[str, float] = {}
    for named in by_device.values():
        read |= zip(named, torch.stack(list(named.values())).tolist(), strict=True)
    return read
