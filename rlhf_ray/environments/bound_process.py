"""Programs that end with the process that started them, however that one ends.

A program whose input is closed need not notice, and a process that is killed can end nothing else. So beside each
program a process of nobody's waits for either to end. It is this file, run as a script: keep its imports small.

::

    worker -- program -- what it starts     one process group, which is killed when the worker or the program has ended
    watcher                                 in a session of its own: Ray kills a worker's children along with it
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Sequence

__all__ = ["bound_command"]

_POLL_S = 0.25
_GRACE_S = 1.0


def bound_command(command: Sequence[str]) -> list[str]:
    """A command that does as the given one and is ended, with what it started, when this process is gone.

    It must be started as the leader of a process group.

    Args:
        command: The program, found by ``PATH``, and its arguments.
    """
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def _main(parent: int, command: Sequence[str]) -> None:
    program = os.getpid()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            _watch(parent, program)
        os._exit(0)
    os.wait()  # The watcher is no child of the program, which may wait for all of its own.
    if os.getppid() != parent:
        sys.exit("the process that started this one is gone")
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and a program would go on doing so.
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(command[0], list(command))
    except OSError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def _watch(parent: int, program: int) -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nothing, descriptor)
    _wait_for_end_of_one(parent, program)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(program, signal.SIGTERM)
        time.sleep(_GRACE_S)
        os.killpg(program, signal.SIGKILL)


def _wait_for_end_of_one(*processes: int) -> None:
    try:
        ends = select.poll()
        for process in processes:
            ends.register(os.pidfd_open(process), select.POLLIN)
        ends.poll()
    except ProcessLookupError:
        return
    except (AttributeError, OSError):  # Not Linux, or one that forbids it.
        while all(map(_lives, processes)):
            time.sleep(_POLL_S)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2:])
