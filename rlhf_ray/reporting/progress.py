"""What the console shows of a run, gathered from its results."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping

from rlhf_ray.reporting.metrics import Scalar, environment_name, held_out_set, number

__all__ = ["Progress"]


class Progress:
    """The newest numbers of a run and the curves behind them.

    Args:
        name: Name of the run.
        iterations: How many iterations the run is to have.
        clock: Seconds from any origin.
    """

    def __init__(self, *, name: str, iterations: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self.iterations = iterations
        self.phase = "starting"
        self.row: Mapping[str, Scalar] = {}
        self.rewards: list[float] = []
        self.evaluations: dict[str, list[float]] = {}
        """Name of a held-out set -> its mean rewards, oldest first."""
        self._clock = clock
        self._started = self._phase_started = clock()
        self._times: list[float] = []

    @property
    def iteration(self) -> int:
        """The newest finished iteration, 0 before the first."""
        return int(self.row.get("training_iteration", 0))

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start, start-up included."""
        return self._clock() - self._started

    @property
    def phase_s(self) -> float:
        """Seconds since the phase or the iteration under way began."""
        return self._clock() - self._phase_started

    @property
    def remaining_s(self) -> float | None:
        """Seconds left at the mean pace of the last ten iterations, ``None`` before the first result."""
        if not self._times:
            return None
        recent = self._times[-10:]
        return max(0, self.iterations - self.iteration) * sum(recent) / len(recent)

    @property
    def environments(self) -> list[str]:
        """Names of the environments of the newest result."""
        return [name for key in self.row if (name := environment_name(key))]

    @property
    def environment_failures(self) -> float:
        """Groups of the newest result that were dropped because their environment failed."""
        return sum(self.number(key) or 0.0 for key in self.row if re.fullmatch("environment/.+/failures/.+", key))

    def number(self, key: str) -> float | None:
        """Read a number of the newest result, ``None`` where it has none."""
        return number(self.row.get(key))

    def total(self, prefix: str) -> float:
        """Sum the numbers of the newest result whose keys start with ``prefix``."""
        return sum(self.number(key) or 0.0 for key in self.row if key.startswith(prefix))

    def enter(self, phase: str) -> None:
        """Begin a phase."""
        self.phase = phase
        self._phase_started = self._clock()

    def record(self, row: Mapping[str, Scalar]) -> None:
        """Add the flat result of an iteration."""
        self.row = row
        self._remember("rollouts/reward_mean", self.rewards)
        self._remember("timers/iteration_s", self._times)
        for key in self.row:
            if name := held_out_set(key):
                self._remember(key, self.evaluations.setdefault(name, []))
        self.enter("training")

    def _remember(self, key: str, curve: list[float]) -> None:
        if (value := self.number(key)) is not None:
            curve.append(value)
