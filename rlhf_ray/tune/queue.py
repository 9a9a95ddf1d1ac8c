"""Before a Ray Tune trial starts its parts: whether the cluster has room for all of them beside those of the others.

Plain bookkeeping without Ray: the trial keeper (trial_keeper.py) asks it. Two trials that each get half of what they
need would wait for each other for ever, so a trial gets all or waits, first come, first served.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Answer", "Room", "TrialRoom"]

# A trial that waits asks every second; one that has not asked for so long is gone.
_FORGOTTEN_S = 30.0
# Ray counts in ten-thousandths.
_ROUNDING = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """CPUs and GPUs, needed or free."""

    cpus: float
    gpus: float
    in_pairs: bool = False
    """Whether replica and learner share each GPU: Ray pairs them as long as nothing else takes parts of GPUs."""

    def __sub__(self, other: Room) -> Room:
        return Room(cpus=self.cpus - other.cpus, gpus=self.gpus - other.gpus)

    def fits_in(self, free: Room) -> bool:
        """Whether there is at least so much."""
        return self.cpus <= free.cpus + _ROUNDING and self.gpus <= free.gpus + _ROUNDING

    def __str__(self) -> str:
        return f"{self.cpus:.2g} CPUs and {self.gpus:g} GPUs" if self.gpus else f"{self.cpus:.2g} CPUs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a trial is told."""

    granted: bool
    free: Room
    """What the cluster has free, less what trials that are starting will take."""
    others: int
    """Trials that have their room."""
    is_next: bool
    """Whether no other trial asked earlier."""


class TrialRoom:
    """Who has room and who waits.

    Args:
        free: What the cluster has free now.
        clock: Seconds.
    """

    def __init__(self, free: Callable[[], Room], clock: Callable[[], float] = time.monotonic) -> None:
        self._free = free
        self._clock = clock
        self._waiting: dict[str, float] = {}
        self._starting: dict[str, Room] = {}
        self._running: set[str] = set()

    def ask(self, trial: str, need: Room) -> Answer:
        """Give a trial its room, or put it into the line; one that waits asks again and again."""
        now = self._clock()
        self._waiting[trial] = now
        self._forget(now)
        free = self._free()
        for taken in self._starting.values():
            free -= taken
        others = len(self._starting) + len(self._running)
        is_next = next(iter(self._waiting)) == trial
        is_in_the_way = bool(self._starting) and any(room.in_pairs for room in (need, *self._starting.values()))
        granted = is_next and need.fits_in(free) and not is_in_the_way
        if granted:
            del self._waiting[trial]
            self._starting[trial] = need
        return Answer(granted=granted, free=free, others=others, is_next=is_next)

    def started(self, trial: str) -> None:
        """All its parts run: from now on the cluster itself counts what they take."""
        if self._starting.pop(trial, None) is not None:
            self._running.add(trial)

    def leave(self, trial: str) -> None:
        """Take a trial out, whatever it was doing."""
        self._waiting.pop(trial, None)
        self._starting.pop(trial, None)
        self._running.discard(trial)

    def is_empty(self) -> bool:
        """Whether no trial has room or waits for it."""
        self._forget(self._clock())
        return not (self._waiting or self._starting or self._running)

    def _forget(self, now: float) -> None:
        for trial in [trial for trial, asked in self._waiting.items() if now - asked > _FORGOTTEN_S]:
            del self._waiting[trial]
