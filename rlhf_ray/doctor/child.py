"""Calls of functions that start engines or Ray, in a process of their own: it may crash or hang.

The process is ``python -m rlhf_ray.doctor.child FOLDER``: it finds the call in the folder and leaves the result there.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from rlhf_ray.rollouts.replica import exceptions_in, root_cause

__all__ = ["ChildFailure", "call_in_child"]

_CALL, _RESULT, _LOG = "call.pkl", "result.pkl", "log.txt"
_Argument = TypeVar("_Argument")
_Result = TypeVar("_Result")


class ChildFailure(Exception):
    """The child did not answer.

    Args:
        reason: Why, in one line.
        log: What it printed; kept.
    """

    def __init__(self, reason: str, log: Path) -> None:
        super().__init__(reason)
        self.reason = reason
        self.log = log


def call_in_child(
    function: Callable[[_Argument], _Result],
    argument: _Argument,
    *,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
) -> _Result:
    """Call a function in a new process.

    Args:
        function: One that can be imported; its module is imported with ``env`` set.
        argument: What it is called with, picklable.
        timeout_s: Longest wait, in seconds.
        env: Added to the environment.

    Raises:
        ChildFailure: It ended without a result, or took too long; in that case it is killed with its children.
    """
    folder = Path(tempfile.mkdtemp(prefix="rlhf-ray-doctor-"))
    (folder / _CALL).write_bytes(pickle.dumps((function, argument)))
    with (folder / _LOG).open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise ChildFailure(f"no answer within {timeout_s:.0f} s", folder / _LOG) from None
        finally:
            # What is left of the child's session: vLLM's core outlives a front that crashed.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if not (folder / _RESULT).is_file():
        raise ChildFailure(_reason(folder / _LOG, process.returncode), folder / _LOG)
    result: _Result = pickle.loads((folder / _RESULT).read_bytes())
    shutil.rmtree(folder)
    return result


def _reason(log: Path, code: int) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    # A wrapper says more than a number.
    return root_cause(lines) or next(reversed(exceptions_in(lines)), f"it ended with code {code}")


if __name__ == "__main__":
    _folder = Path(sys.argv[1])
    _function, _value = pickle.loads((_folder / _CALL).read_bytes())
    (_folder / _RESULT).write_bytes(pickle.dumps(_function(_value)))
