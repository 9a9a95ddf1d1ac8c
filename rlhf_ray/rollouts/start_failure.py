"""Finds the one line that says why an engine, or another process with a log, could not start or has ended.

vLLM runs its engine in a process of its own; that process's traceback goes to the replica's log, and the replica itself
only hears that "initialization failed", or that the engine "encountered an issue".
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from rlhf_ray.untrusted_text import shortened

__all__ = ["engine_failure", "exceptions_in", "root_cause"]

_ERROR_LINE = re.compile(r"(?:^|\s)((?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit): .+)$")
# What names no cause by itself: vLLM's and Ray's wrappers around the line that does.
_WRAPPERS = (
    "Engine core initialization failed",
    "Engine core proc",
    "EngineCore encountered",
    "EngineDeadError",
    "ray.exceptions.",
    "Traceback",
)
_LOG_BYTES = 64 * 1024
# An engine's error may quote its whole configuration, or the prompts of a batch.
_LONGEST = 1000


def exceptions_in(lines: Iterable[str]) -> list[str]:
    """What the lines of a log say of exceptions, wrappers included: type and message of each, in their order."""
    found = (_ERROR_LINE.search(line.rstrip()) for line in lines)
    return [match.group(1) for match in found if match is not None]


def root_cause(lines: Iterable[str]) -> str | None:
    """The last line that names an exception other than a wrapper's; ``None`` when there is none."""
    causes = [named for named in exceptions_in(lines) if not any(wrapper in named for wrapper in _WRAPPERS)]
    return causes[-1] if causes else None


def engine_failure(error: BaseException) -> str:
    """Say in one line why the engine of this process could not start or has ended.

    What failed in this process is the error itself; what failed in the engine's own is in the log.
    """
    cause = f"{type(error).__name__}: {error}"
    if any(wrapper in cause for wrapper in _WRAPPERS):
        cause = root_cause(_own_log()) or cause
    return shortened(cause, _LONGEST)


def _own_log() -> list[str]:
    """The end of the file that this process's standard error is redirected to; empty where it is no file."""
    if not stat.S_ISREG(os.fstat(2).st_mode):
        return []
    path = Path("/proc/self/fd/2")
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - _LOG_BYTES))
        return log.read().decode(errors="replace").splitlines()
