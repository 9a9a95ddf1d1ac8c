"""How a setting is declared: its default, one line of meaning, and the numbers that it may be."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Bounds", "setting"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """The finite numbers that a setting, or each number in it, may be."""

    ge: float | None = None
    """At least this."""
    gt: float | None = None
    """More than this."""
    le: float | None = None
    """At most this."""
    lt: float | None = None
    """Less than this."""

    def __contains__(self, number: float) -> bool:
        return (
            math.isfinite(number)
            and (self.ge is None or number >= self.ge)
            and (self.gt is None or number > self.gt)
            and (self.le is None or number <= self.le)
            and (self.lt is None or number < self.lt)
        )

    def __str__(self) -> str:
        sides = {"of at least": self.ge, "greater than": self.gt, "at most": self.le, "less than": self.lt}
        named = [f"{side} {limit}" for side, limit in sides.items() if limit is not None]
        return f"a number {' and '.join(named)}" if named else "a finite number"


def setting(
    default: Any,
    meaning: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    **metadata: Any,
) -> Any:
    """Declare a setting. Its annotation is its type: what fits neither that nor the bounds is refused.

    Args:
        default: The default of a run that names a model or data.
        meaning: One line, with the unit.
        ge: Smallest number allowed, where it is one or holds some.
        gt: Largest number that is too small.
        le: Largest number allowed.
        lt: Smallest number that is too large.
        **metadata: ``quickstart``, the value of the quickstart's preset where that differs, and ``source``, where the
            default was published.
    """
    metadata = {"meaning": meaning, "bounds": Bounds(ge=ge, gt=gt, le=le, lt=lt), **metadata}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)
