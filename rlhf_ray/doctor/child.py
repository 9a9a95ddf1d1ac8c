"""Before a run: checks that start engines or Ray do so in a process of their own, which may crash or hang.

The child is a module run as ``python -m MODULE FOLDER``: it finds its input in the folder, and leaves its answer there.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlhf_ray.rollouts.start_failure import exceptions_in, root_cause

__all__ = ["ChildFailure", "answer", "run_child"]

_INPUT, _ANSWER, _LOG = "input.pkl", "answer.json", "log.txt"


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


def run_child(module: str, value: Any, *, timeout_s: float, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run a module in a new process and return its answer.

    Args:
        module: Module that calls :func:`answer` when run.
        value: Its input, picklable.
        timeout_s: Longest wait, in seconds.
        env: Added to the environment.

    Raises:
        ChildFailure: It ended without an answer, or took too long; in that case it is killed with its children.
    """
    folder = Path(tempfile.mkdtemp(prefix="rlhf-ray-doctor-"))
    (folder / _INPUT).write_bytes(pickle.dumps(value))
    with (folder / _LOG).open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(folder)],
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
            _end_session(process)
    if not (folder / _ANSWER).is_file():
        raise ChildFailure(_reason(folder / _LOG, process.returncode), folder / _LOG)
    result: dict[str, Any] = json.loads((folder / _ANSWER).read_text(encoding="utf-8"))
    shutil.rmtree(folder)
    return result


def answer(work: Callable[[Any], dict[str, Any]]) -> None:
    """Be the child: read the input, do the work, leave the answer."""
    folder = Path(sys.argv[1])
    result = work(pickle.loads((folder / _INPUT).read_bytes()))
    (folder / _ANSWER).write_text(json.dumps(result), encoding="utf-8")


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the child's session: vLLM's core outlives a front that crashed."""
    with contextlib.suppress(ProcessLookupError):  # nothing is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _reason(log: Path, code: int) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    # A wrapper says more than a number.
    return root_cause(lines) or next(reversed(exceptions_in(lines)), f"it ended with code {code}")
