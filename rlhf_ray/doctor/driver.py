"""What NVIDIA's driver offers, and whether the GPU packages run on it.

``make setup`` runs this file before anything is installed, to decide what to download: it imports nothing else.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass

__all__ = ["GPU", "Driver", "device_to_install"]

# vLLM's wheel of this release is built for CUDA 13.
_OLDEST = 580
_FIELDS = "driver_version,name,memory.total,memory.free"


@dataclass(frozen=True, slots=True, kw_only=True)
class GPU:
    """One NVIDIA GPU."""

    name: str
    memory_bytes: int
    """0: the driver does not say, as where the GPU shares the memory of the CPU."""
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """The driver of this machine, and its GPUs."""

    version: str
    gpus: tuple[GPU, ...]

    @classmethod
    def here(cls) -> Driver | None:
        """Ask ``nvidia-smi``; ``None``: there is none, or it sees no GPU."""
        query = ["nvidia-smi", f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits"]
        if shutil.which(query[0]) is None:
            return None
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
        except (subprocess.SubprocessError, OSError):
            # A driver that does not answer offers no GPU; torch tells the same story.
            return None
        rows = [[part.strip() for part in line.split(",")] for line in answer.splitlines()]
        rows = [row for row in rows if len(row) == _FIELDS.count(",") + 1]
        gpus = tuple(GPU(name=name, memory_bytes=_mib(total), free_bytes=_mib(free)) for _, name, total, free in rows)
        return cls(version=rows[0][0], gpus=gpus) if rows else None

    @property
    def too_old(self) -> str:
        """Why the GPU packages do not run on it; empty where they do."""
        major = self.version.partition(".")[0]
        if major.isdigit() and int(major) < _OLDEST:
            return f"NVIDIA's driver {self.version} is older than {_OLDEST}, which CUDA 13 and so vLLM needs"
        return ""


def device_to_install(asked: str | None = None) -> str:
    """The packages to install: ``gpu`` or ``cpu``; says on standard error what may surprise.

    Args:
        asked: What the user wants; ``None``: GPUs where the driver can run them.

    Raises:
        SystemExit: The user wants GPUs, whose driver is too old.
    """
    driver = Driver.here()
    reason = driver.too_old if driver else ""
    if asked == "gpu" and reason:
        sys.exit(f"{reason}: update the driver, or install for CPUs with DEVICE=cpu")
    if asked is None and reason:
        print(f"{reason}: installing for CPUs. After an update of the driver: make clean setup", file=sys.stderr)
    return asked or ("gpu" if driver and not reason else "cpu")


def _mib(text: str) -> int:
    return int(text) * 1024**2 if text.isdigit() else 0


if __name__ == "__main__":
    print(device_to_install(*sys.argv[1:]))
