"""What learner ranks answer to an update, and how the answers of all ranks become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_ray.types import Float32Array

__all__ = ["UpdateResult", "merged_results"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """An update, carried out."""

    figures: Mapping[str, float]
    """The same on every rank."""
    advantages: tuple[Float32Array, ...] | None = None
    """A sequence each, ``[T]`` as they enter the loss, ``[0]`` where the completion is left out of it; none where
    nobody asked."""


def merged_results(results: Sequence[UpdateResult], sequences: Sequence[Sequence[int]]) -> UpdateResult:
    """The answers of all ranks as that to the whole batch.

    Args:
        results: One a rank.
        sequences: Per rank, which sequences of the batch it holds, in its local order.
    """
    figures = results[0].figures
    if any(result.advantages is None for result in results):
        return UpdateResult(figures=figures)
    of_sequence = {
        index: advantages
        for result, indices in zip(results, sequences, strict=True)
        for index, advantages in zip(indices, result.advantages or (), strict=True)
    }
    return UpdateResult(figures=figures, advantages=tuple(of_sequence[index] for index in sorted(of_sequence)))
