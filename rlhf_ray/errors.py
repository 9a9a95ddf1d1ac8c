"""What can go wrong, and what to catch.

::

    RLHFRayError
    |-- ConfigError        a setting is unknown, impossible or out of range
    |-- DataError          a dataset is missing, empty, or lacks a column
    |-- RolloutError       the replicas cannot start, or stop answering
    |-- RewardError        too many reward calls failed in one iteration
    |-- LearnerError       a learner cannot start, fails, or stops answering
    `-- WeightSyncError    a replica did not acknowledge the published version
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "DataError",
    "LearnerError",
    "RLHFRayError",
    "RewardError",
    "RolloutError",
    "WeightSyncError",
]


class RLHFRayError(Exception):
    """Base of every error this library raises on purpose."""


class ConfigError(RLHFRayError, ValueError):
    """A setting is unknown, impossible or out of range.

    Args:
        field: Dotted name of the setting, for example ``training.lr``.
        value: What was given.
        remedy: What to write instead.
    """

    def __init__(self, field: str, value: object, remedy: str) -> None:
        super().__init__(f"{field} = {value!r}: {remedy}")
        self.field = field
        self.value = value
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, object, str]]:
        """Rebuild from the three parts, so that the error survives a process boundary."""
        return type(self), (self.field, self.value, self.remedy)


class DataError(RLHFRayError):
    """A dataset is missing, empty, or lacks a column."""


class RolloutError(RLHFRayError):
    """The replicas cannot start, or stop answering."""


class RewardError(RLHFRayError):
    """Too many reward calls failed in one iteration."""


class LearnerError(RLHFRayError):
    """A learner cannot start, fails, or stops answering."""


class WeightSyncError(RLHFRayError):
    """A replica did not acknowledge the published version."""
