from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from rlhf_ray.doctor.child import ChildFailure, run_child


def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str) -> str:
    """Write a module whose ``work(value)`` has this body."""
    body = "\n".join(f"    {line}" for line in work.splitlines())
    (tmp_path / "child_work.py").write_text(
        f"import os, subprocess, sys, time\nfrom rlhf_ray.doctor.child import answer\n\n"
        f"def work(value):\n{body}\n\nif __name__ == '__main__':\n    answer(work)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return "child_work"


def test_the_answer_comes_back_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = module(tmp_path, monkeypatch, "print('noise')\nreturn {'sum': sum(value), 'seen': os.environ['GIVEN']}")
    assert run_child(name, (1, 2, 3), timeout_s=30, env={"GIVEN": "yes"}) == {"sum": 6, "seen": "yes"}
    assert list(tmp_path.glob("rlhf-ray-doctor-*")) == []


def test_an_error_is_its_reason_and_the_log_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = module(
        tmp_path,
        monkeypatch,
        "print('(EngineCore pid=1) ERROR RuntimeError: not enough memory')\n"
        "raise RuntimeError('Engine core initialization failed. See root cause above.')",
    )
    with pytest.raises(ChildFailure) as caught:
        run_child(name, None, timeout_s=30)
    assert caught.value.reason == "RuntimeError: not enough memory"
    assert "Engine core initialization failed" in caught.value.log.read_text()


def test_an_error_that_was_got_over_is_not_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = module(tmp_path, monkeypatch, "print('ImportError: no triton, going on')\nraise ValueError('no such dtype')")
    with pytest.raises(ChildFailure) as caught:
        run_child(name, None, timeout_s=30)
    assert caught.value.reason == "ValueError: no such dtype"


def test_a_wrapper_alone_is_better_than_a_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = module(tmp_path, monkeypatch, "raise RuntimeError('Engine core initialization failed.')")
    with pytest.raises(ChildFailure, match=r"RuntimeError: Engine core initialization failed\."):
        run_child(name, None, timeout_s=30)


def test_a_crash_without_words_is_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = module(tmp_path, monkeypatch, "os._exit(7)")
    with pytest.raises(ChildFailure, match="code 7"):
        run_child(name, None, timeout_s=30)


def test_a_child_that_hangs_is_killed_with_its_own_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid_file = tmp_path / "pid"
    name = module(
        tmp_path,
        monkeypatch,
        f"other = subprocess.Popen(['sleep', '60'])\n"
        f"open({str(pid_file)!r}, 'w').write(str(other.pid))\n"
        "time.sleep(60)",
    )
    with pytest.raises(ChildFailure, match="no answer within 5 s"):
        run_child(name, None, timeout_s=5)
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
