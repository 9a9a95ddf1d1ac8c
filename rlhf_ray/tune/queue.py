"""Which Ray Tune trial may start its parts: the cluster must have resources for all of them at once.

Plain bookkeeping without Ray: the supervisor (supervisor.py) asks it. Two trials that each get half of what they need
would wait for each other forever, so a trial gets all or waits, first come, first served.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Answer", "Resources", "TrialQueue"]

# A trial that waits asks every second; one that has not asked for so long is gone.
_FORGOTTEN_S = 30.0
# Ray counts in ten-thousandths.
_ROUNDING = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """CPUs and GPUs, needed or free."""

    cpus: float
    gpus: float
    in_pairs: bool = False
    """Whether replica and learner share each GPU: Ray pairs them as long as nothing else takes parts of GPUs."""

    def __sub__(self, other: Resources) -> Resources:
        return Resources(cpus=self.cpus - other.cpus, gpus=self.gpus - other.gpus)

    def fit_in(self, free: Resources) -> bool:
        """Whether there is at least so much."""
        return self.cpus <= free.cpus + _ROUNDING and self.gpus <= free.gpus + _ROUNDING

    def __str__(self) -> str:
        return f"{self.cpus:.2g} CPUs and {self.gpus:g} GPUs" if self.gpus else f"{self.cpus:.2g} CPUs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a trial is told."""

    granted: bool
    free: Resources
    """What the cluster has free, less what trials that are starting will take."""
    others: int
    """Trials that have their resources."""
    is_next: bool
    """Whether no other trial asked earlier."""


@dataclass(slots=True, kw_only=True)
class _Trial:
    need: Resources
    asked_at: float
    granted_at: float | None = None
    has_started: bool = False
    parts: Any = None


class TrialQueue:
    """Trials that wait, start or run, in the order in which they asked first.

    Args:
        free: What the cluster has free now.
        clock: Seconds.
    """

    def __init__(self, free: Callable[[], Resources], clock: Callable[[], float] = time.monotonic) -> None:
        self._free = free
        self._clock = clock
        self._trials: dict[str, _Trial] = {}

    def ask(self, name: str, need: Resources) -> Answer:
        """Give a trial its resources, or put it into the queue; one that waits asks again and again."""
        now = self._clock()
        trial = self._trials.setdefault(name, _Trial(need=need, asked_at=now))
        trial.need, trial.asked_at = need, now
        self._forget()
        others = [other for other in self._trials.values() if other.granted_at is not None]
        starting = [other.need for other in others if not other.has_started]
        free = self._free()
        for taken in starting:
            free -= taken
        is_next = next((other for other in self._trials.values() if other.granted_at is None), None) is trial
        is_in_the_way = bool(starting) and any(each.in_pairs for each in (need, *starting))
        granted = is_next and need.fit_in(free) and not is_in_the_way
        if granted:
            trial.granted_at = now
        return Answer(granted=granted, free=free, others=len(others), is_next=is_next)

    def watch(self, name: str, parts: Any) -> None:
        """Remember what a trial has started, even if it was given up meanwhile."""
        now = self._clock()
        late = _Trial(need=Resources(cpus=0.0, gpus=0.0), asked_at=now, granted_at=now)
        self._trials.setdefault(name, late).parts = parts

    def started(self, name: str) -> None:
        """All its parts run: from now on the cluster itself counts what they take."""
        if name in self._trials:
            self._trials[name].has_started = True

    def leave(self, name: str) -> None:
        """Remove a trial, whatever its state."""
        self._trials.pop(name, None)

    def watched(self) -> dict[str, Any]:
        """The parts of each trial that has some."""
        return {name: trial.parts for name, trial in self._trials.items() if trial.parts is not None}

    def unwatched(self, for_s: float) -> list[str]:
        """Trials that got their resources so long ago and have started nothing."""
        since = self._clock() - for_s
        without = ((name, trial.granted_at) for name, trial in self._trials.items() if trial.parts is None)
        return [name for name, granted_at in without if granted_at is not None and granted_at < since]

    def is_empty(self) -> bool:
        """Whether no trial has resources or waits for them."""
        self._forget()
        return not self._trials

    def _forget(self) -> None:
        since = self._clock() - _FORGOTTEN_S
        for name in [name for name, each in self._trials.items() if each.granted_at is None and each.asked_at < since]:
            del self._trials[name]
