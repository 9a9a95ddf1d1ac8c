"""What a learner rank is given for an update, what it answers, and how the answers of all ranks become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ray.learner.packing import RankPlan
from rlhf_ray.types import Float32Array

__all__ = ["UpdateOrder", "UpdateResult", "merged_results"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateOrder:
    """One rank's share of an update."""

    batch: Any
    """Reference to the rank's own sequences."""
    plan: RankPlan
    version: int
    """Of the policy afterward."""
    update_policy: bool
    """False in the critic's warm-up."""
    with_advantages: bool
    """Whether the answer holds them."""
    keeps_state: bool
    """Whether the state afterward is to be kept."""
    spared_version: int | None
    """Whose kept state is not overwritten then, since a checkpoint is written of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """An update, carried out."""

    figures: Mapping[str, float]
    """The same on every rank."""
    advantages: tuple[Float32Array, ...] | None = None
    """Per sequence ``[T]`` as they enter the loss, NaN at tokens that do not; ``None`` where they are not asked for."""
    kept_version: int | None = None
    """The newest policy version whose state is kept, on all ranks; none: there is no such version."""


def merged_results(results: Sequence[UpdateResult], sequences: Sequence[Sequence[int]]) -> UpdateResult:
    """The answers of all ranks as that to the whole batch.

    Args:
        results: One a rank; neighbors that read slices of the same sequences have one share, and the first its answer.
        sequences: Per rank, which sequences of the batch it holds, in its local order.
    """
    figures = results[0].figures
    kept = [result.kept_version for result in results if result.kept_version is not None]
    kept_version = min(kept) if len(kept) == len(results) else None
    shares = results[:: len(results) // len(sequences)]
    if any(result.advantages is None for result in shares):
        return UpdateResult(figures=figures, kept_version=kept_version)
    of_sequence = {
        index: advantages
        for result, indices in zip(shares, sequences, strict=True)
        for index, advantages in zip(indices, result.advantages or (), strict=True)
    }
    advantages = tuple(of_sequence[index] for index in sorted(of_sequence))
    return UpdateResult(figures=figures, advantages=advantages, kept_version=kept_version)
