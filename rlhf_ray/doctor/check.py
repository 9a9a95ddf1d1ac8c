"""What a check of the doctor found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

from rlhf_ray.errors import ConfigError

__all__ = ["Check", "Status", "in_units"]

Status = Literal["ok", "warn", "fail"]
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was checked."""

    name: str
    status: Status
    """``fail``: a run cannot work; ``warn``: it may not, or not well."""
    detail: str
    """What was found."""
    remedy: str = ""
    """What to do about it; empty when there is nothing to do."""

    @classmethod
    def of(cls, error: ConfigError) -> Self:
        """A setting that a run would refuse."""
        return cls(error.field, "fail", repr(error.value), error.remedy)


def in_units(size_bytes: float) -> str:
    """Write a number of bytes as ``512 B``, ``3.1 MiB`` or ``24 GiB``."""
    size, power = float(size_bytes), 0
    while size >= 1024 and power < len(_UNITS) - 1:
        size, power = size / 1024, power + 1
    return f"{size:.1f} {_UNITS[power]}" if size < 10 and power else f"{size:.0f} {_UNITS[power]}"
