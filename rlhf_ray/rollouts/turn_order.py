"""Which turn of a trajectory follows which, where an agent has several conversations, some of them in parallel.

::

    main      0                    5 - 6
    helper       1 ----- 3 ----
    another      2 - 4

0 is followed by 1, the first that was asked once its answer was known. 1 is followed by 3 and not by 4: the helpers'
conversations are in parallel. 3 and 4 are both followed by 5, since the main conversation waited meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["TurnTime", "followers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnTime:
    """When a turn was asked and answered, counted in the answers of its trajectory."""

    sequence: int
    """Index of its sequence."""
    known: int
    """Answers that the agent had when it asked."""
    answer: int
    """The number of its own, from 0."""


def followers(turns: Sequence[TurnTime]) -> list[int | None]:
    """The turn that each one passes credit from; ``None``: none, it is one of the last.

    It is the first that was asked once the answer was known, in the same sequence or in one that was never sampled in
    parallel to this one. What agents do with an answer is not seen: of several parallel conversations, one that ends is
    taken to lead to whichever new conversation begins first.

    Args:
        turns: In the order in which they were asked.
    """
    if not turns:
        return []
    sequences = np.asarray([turn.sequence for turn in turns])
    known, answers = (np.asarray([getattr(turn, name) for turn in turns]) for name in ("known", "answer"))
    before = answers[:, None] < known
    overlap = ~(before | before.T)
    np.fill_diagonal(overlap, False)
    first, second = np.nonzero(overlap)
    in_parallel = np.zeros((sequences.max() + 1,) * 2, dtype=np.bool_)
    in_parallel[sequences[first], sequences[second]] = True
    may_follow = before & ~in_parallel[sequences[:, None], sequences]
    return [int(row.argmax()) if row.any() else None for row in may_follow]
