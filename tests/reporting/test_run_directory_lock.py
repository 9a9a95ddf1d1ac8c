from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.errors import ConfigError
from rlhf_ray.reporting.run_directory import RunLock

_HOLD = """
import sys, time
from pathlib import Path
from rlhf_ray.reporting.run_directory import RunLock
lock = RunLock.take(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


def test_another_process_is_named_and_its_death_frees_the_lock(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        holder = f"process {other.pid} on {socket.gethostname()} is writing this run: stop it first"
        with pytest.raises(ConfigError, match=holder) as caught:
            RunLock.take(tmp_path)
        assert (caught.value.field, caught.value.value) == ("reporting.run_dir", str(tmp_path))
        other.send_signal(signal.SIGKILL)
        other.wait()

    RunLock.take(tmp_path).release()


def test_one_process_may_lock_again_after_its_release(tmp_path: Path) -> None:
    for _ in range(2):
        lock = RunLock.take(tmp_path)
        with pytest.raises(ConfigError, match=f"process {os.getpid()} "):
            RunLock.take(tmp_path)
        lock.release()
        lock.release()


def test_directories_have_a_lock_each(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    locks = [RunLock.take(folder) for folder in folders]
    for lock in locks:
        lock.release()


def test_who_ends_soon_is_waited_for(tmp_path: Path) -> None:
    lock = RunLock.take(tmp_path)
    threading.Timer(0.3, lock.release).start()

    RunLock.take(tmp_path, wait_s=30.0).release()


def test_where_files_cannot_be_locked_the_run_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING):
        RunLock.take(tmp_path).release()

    assert "cannot be locked" in caplog.text
