"""Memory of the machine that this process runs on, limits of its container included."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["first_line", "host_memory"]


def host_memory() -> tuple[int, int]:
    """Total and available bytes: the machine's, or the container's where that has less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = next(
        (int(line.split()[1]) * 1024 for line in _lines(Path("/proc/meminfo")) if line.startswith("MemAvailable:")),
        total,
    )
    for limit_file, usage_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        limit, usage = first_line(Path(limit_file)), first_line(Path(usage_file))
        if limit.isdigit() and usage.isdigit() and int(limit) < total:
            return int(limit), min(available, int(limit) - int(usage))
    return total, available


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        # Not Linux, or not this version of cgroups.
        return []


def first_line(path: Path) -> str:
    """Of a small file; empty where there is none."""
    return next(iter(_lines(path)), "")
