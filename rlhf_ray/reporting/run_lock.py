"""Keeps a second driver out of a run directory."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from rlhf_ray.errors import ConfigError

__all__ = ["RunLock"]

_LOG = logging.getLogger(__name__)
_FILE = ".lock"
_POLL_S = 0.2


class RunLock:
    """Held by the driver that writes a run directory, from its start to its stop.

    The system frees it when the process ends, however that ends. The file stays: where it was deleted, two drivers
    could hold locks on two files of one name.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file

    @classmethod
    def take(cls, folder: Path, *, wait_s: float = 0.0) -> RunLock:
        """Lock a run directory.

        Args:
            folder: The directory, which exists.
            wait_s: How long to wait for a driver that is about to end, in seconds.

        Raises:
            ConfigError: Another driver has the lock.
        """
        file = (folder / _FILE).open("a+", encoding="utf-8")
        deadline = time.monotonic() + wait_s
        while not _locked(file):
            if time.monotonic() >= deadline:
                holder = _holder(file)
                file.close()
                remedy = f"{holder} is writing this run: stop it first, or choose another folder"
                raise ConfigError("reporting.run_dir", str(folder), remedy)
            time.sleep(_POLL_S)
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        file.flush()
        return cls(file)

    def release(self) -> None:
        """Let the next driver in; a second call does nothing."""
        self._file.close()


def _locked(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # Some network file systems know no locks.
        _LOG.warning("%s cannot be locked (%s); start no second run in its folder", file.name, error)
    return True


def _holder(file: TextIO) -> str:
    try:
        file.seek(0)
        holder = json.loads(file.read())
        return f"process {holder['pid']} on {holder['host']}"
    except (ValueError, TypeError, KeyError):  # It holds the lock and has not said so yet.
        return "another process"
