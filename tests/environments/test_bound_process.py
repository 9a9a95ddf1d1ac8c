"""Programs that end with the process that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from rlhf_ray.environments import bound_process
from rlhf_ray.environments.bound_process import bound_command

# Neither the end of its input nor SIGTERM ends it, nor what it starts.
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) > 2:
    subprocess.Popen([sys.executable, __file__, sys.argv[1]])
open(f"{sys.argv[1]}/{os.getpid()}", "w").close()
while True:
    time.sleep(600)
"""
# A process that a shell started in the background ignores SIGINT.
PARENT = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from rlhf_ray.environments.bound_process import bound_command
subprocess.Popen(bound_command(sys.argv[1:]), stdin=subprocess.PIPE, start_new_session=True)
time.sleep(600)
"""


def wait_for(what: str, condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def script(folder: Path, name: str, text: str) -> str:
    path = folder / f"{name}.py"
    path.write_text(textwrap.dedent(text))
    return str(path)


def alive(text: str) -> list[psutil.Process]:
    """Processes with the text in their commands."""
    found = []
    for process in psutil.process_iter():
        try:
            if text in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize("how", ["interrupted", "killed", "killed with its children"])
def test_a_program_and_what_it_started_end_with_their_parent(tmp_path: Path, how: str) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    program = [sys.executable, script(tmp_path, "stubborn", STUBBORN), str(marks), "with another"]
    parent = subprocess.Popen([sys.executable, script(tmp_path, "parent", PARENT), *program], stderr=subprocess.DEVNULL)
    wait_for("both started", lambda: len(list(marks.iterdir())) == 2)
    assert len(alive(str(marks))) == 4, "the parent, both programs and the one that watches"

    children = psutil.Process(parent.pid).children()
    parent.send_signal(signal.SIGINT if how == "interrupted" else signal.SIGKILL)
    if how == "killed with its children":
        for child in children:
            child.kill()
    parent.wait(timeout=30)

    wait_for("all ended", lambda: alive(str(marks)) == [])


def test_what_a_program_leaves_behind_ends_after_it(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    stubborn = script(tmp_path, "stubborn", STUBBORN)
    starts = f"import subprocess, sys; subprocess.Popen([sys.executable, {stubborn!r}, {str(marks)!r}])"

    assert subprocess.run(bound_command([sys.executable, "-c", starts]), start_new_session=True).returncode == 0

    wait_for("all ended", lambda: alive(str(marks)) == [])


@pytest.mark.parametrize("missing", [AttributeError, PermissionError])
def test_without_file_descriptors_of_processes_they_are_asked(
    monkeypatch: pytest.MonkeyPatch, missing: type[Exception]
) -> None:
    def refuse(process: int) -> int:
        raise missing

    monkeypatch.setattr(os, "pidfd_open", refuse, raising=False)
    process = subprocess.Popen(["sleep", "600"])
    waiting = threading.Thread(target=bound_process._wait_for_end_of_one, args=(os.getpid(), process.pid))
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    process.kill()
    process.wait()
    waiting.join(10)
    assert not waiting.is_alive()


def ended(*program: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = bound_command([sys.executable, "-c", *program])
    return subprocess.run(command, input=given, capture_output=True, start_new_session=True, timeout=30)


def test_input_outputs_and_status_are_the_programs() -> None:
    echo = "import sys; print(sys.stdin.read() + sys.argv[1]); print('no', file=sys.stderr); sys.exit(3)"

    done = ended(echo, "b c", given=b"a ")

    assert (done.stdout, done.stderr, done.returncode) == (b"a b c\n", b"no\n", 3)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        program = f"import os, signal; signal.signal(2, signal.SIG_DFL); os.kill(os.getpid(), {int(number)})"
        assert ended(program).returncode == -number
    piped = bound_command(["sh", "-c", "yes | head -1"])
    assert subprocess.run(piped, capture_output=True, start_new_session=True).stderr == b"", "pipes break silently"


def test_the_output_ends_with_the_program() -> None:
    program = "import os, time; os.close(1); time.sleep(60)"
    command = bound_command([sys.executable, "-c", program])
    started = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert started.stdout is not None
        assert started.stdout.read() == b""
    finally:
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()
        started.stdout.close()


def test_a_program_that_cannot_be_started_says_so(tmp_path: Path) -> None:
    command = bound_command([str(tmp_path)])

    done = subprocess.run(command, capture_output=True, start_new_session=True, timeout=30)

    assert done.returncode == 1
    assert done.stderr.startswith(b"PermissionError: ")
