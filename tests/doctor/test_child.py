from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.doctor.child import ChildFailure, call_in_child


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Write a module whose ``work(value)`` has this body, for this process and its children."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    def work(body: str) -> Any:
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        (tmp_path / "child_work.py").write_text(f"import os, subprocess, sys, time\n\ndef work(value):\n{lines}")
        return importlib.import_module("child_work").work

    yield work
    sys.modules.pop("child_work", None)


def test_the_answer_comes_back_and_nothing_is_left(work: Callable[[str], Any], tmp_path: Path) -> None:
    function = work("print('noise')\nreturn {'sum': sum(value), 'seen': os.environ['GIVEN']}")
    assert call_in_child(function, (1, 2, 3), timeout_s=30, env={"GIVEN": "yes"}) == {"sum": 6, "seen": "yes"}
    assert list(tmp_path.glob("rlhf-ray-doctor-*")) == []


def test_an_error_is_its_reason_and_the_log_stays(work: Callable[[str], Any], tmp_path: Path) -> None:
    function = work(
        "print('(EngineCore pid=1) ERROR RuntimeError: not enough memory')\n"
        "raise RuntimeError('Engine core initialization failed. See root cause above.')",
    )
    with pytest.raises(ChildFailure) as caught:
        call_in_child(function, None, timeout_s=30)
    assert caught.value.reason == "RuntimeError: not enough memory"
    assert "Engine core initialization failed" in caught.value.log.read_text()


def test_an_error_that_was_got_over_is_not_the_reason(work: Callable[[str], Any], tmp_path: Path) -> None:
    function = work("print('ImportError: no triton, going on')\nraise ValueError('no such dtype')")
    with pytest.raises(ChildFailure) as caught:
        call_in_child(function, None, timeout_s=30)
    assert caught.value.reason == "ValueError: no such dtype"


def test_a_wrapper_alone_is_better_than_a_code(work: Callable[[str], Any], tmp_path: Path) -> None:
    function = work("raise RuntimeError('Engine core initialization failed.')")
    with pytest.raises(ChildFailure, match=r"RuntimeError: Engine core initialization failed\."):
        call_in_child(function, None, timeout_s=30)


def test_a_crash_without_words_is_its_code(work: Callable[[str], Any], tmp_path: Path) -> None:
    function = work("os._exit(7)")
    with pytest.raises(ChildFailure, match="code 7"):
        call_in_child(function, None, timeout_s=30)


def test_a_child_that_hangs_is_killed_with_its_own_children(work: Callable[[str], Any], tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    function = work(
        f"other = subprocess.Popen(['sleep', '60'])\n"
        f"open({str(pid_file)!r}, 'w').write(str(other.pid))\n"
        "time.sleep(60)",
    )
    with pytest.raises(ChildFailure, match="no answer within 5 s"):
        call_in_child(function, None, timeout_s=5)
    assert gone(int(pid_file.read_text()))


def gone(pid: int) -> bool:
    """Whether a process ends within two seconds (a zombie that nobody has collected yet has ended)."""
    for _ in range(40):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False
