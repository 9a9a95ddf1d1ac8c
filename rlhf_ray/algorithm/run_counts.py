"""Around the loop: what was counted since the run began, by this process and by those before it was resumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

__all__ = ["RunCounts"]


class RunCounts:
    """Counts that a checkpoint remembers.

    Args:
        here: Reads what this process has counted, always with the same names.
    """

    def __init__(self, here: Callable[[], Mapping[str, int]]) -> None:
        self._here = here
        self._before: dict[str, int] = {}

    def totals(self) -> dict[str, int]:
        """Name -> count since the run began."""
        return {name: self._before.get(name, 0) + count for name, count in self._here().items()}

    def go_on_from(self, totals: Mapping[str, int]) -> None:
        """Continue a run that had counted ``totals``; what this process has counted so far is not the run's."""
        self._before = {name: totals.get(name, 0) - count for name, count in self._here().items()}
