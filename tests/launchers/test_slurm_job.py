"""The launcher's jobs in a real Slurm of one node."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

Launch = Callable[..., "subprocess.CompletedProcess[str]"]
WaitFor = Callable[[Callable[[], object], str, float], None]

SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path

start = int(os.environ.get("SLURM_RESTART_COUNT", 0))
if WAITS and start == 0:
    signal.signal(signal.SIGTERM, lambda *_: (Path("stopped").write_text("cleanly"), sys.exit(143)))
    Path("waiting").touch()
    time.sleep(600)

import ray

ray.init()
nodes, cpus = len(ray.nodes()), ray.cluster_resources()["CPU"]
said = {"nodes": nodes, "cpus": cpus, "argv": sys.argv[1:], "spaced": os.environ["SPACED"], "cwd": os.getcwd()}
Path("part").write_text(json.dumps(said))
Path("part").rename(f"result-{start}.json")
sys.exit(CODE)
"""


class Slurm:
    """One test's jobs."""

    def __init__(self, launch: Launch, folder: Path, conf: Path, wait_for: WaitFor) -> None:
        self.folder = folder
        self._launch = launch
        self._wait_for = wait_for
        # Ray's sockets want a short path.
        self._env = {"SLURM_CONF": str(conf), "RAY_TMPDIR": str(conf.parent)}
        folder.mkdir()
        self.write_script()

    def write_script(self, *, waits: bool = False, code: int = 0) -> None:
        """What the jobs run; it waits at its first start, or at none."""
        script = SCRIPT.replace("WAITS", str(waits)).replace("CODE", str(code))
        (self.folder / "a script.py").write_text(script)

    def launch(self, *words: str) -> subprocess.CompletedProcess[str]:
        common = ("a script.py", "--job-name", "tiny", "--cpus-per-task", "1", "--env", "SPACED=it's a #1 $HOME")
        return self._launch("slurm", *common, *words, cwd=self.folder, **self._env)

    def submit(self, *words: str) -> str:
        done = self.launch(*words)
        assert done.returncode == 0, done.stderr
        found = re.search(r"submitted job (\d+)", done.stdout)
        assert found is not None
        return found[1]

    def ask(self, *command: str) -> str:
        return subprocess.run(
            command, env={**os.environ, **self._env}, capture_output=True, text=True, timeout=30, check=True
        ).stdout

    def field(self, job: str, name: str) -> str:
        found = re.search(rf"\b{name}=(\S+)", self.ask("scontrol", "show", "job", job))
        assert found is not None
        return found[1]

    def wait(self, job: str, *states: str, timeout_s: float = 120) -> None:
        try:
            self._wait_for(lambda: self.field(job, "JobState") in states, f"job {states}", timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.ask('scontrol', 'show', 'job', job)}\n{self.logs()}") from error

    def wait_for_file(self, name: str) -> None:
        try:
            self._wait_for((self.folder / name).exists, name, 120)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from error

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in self.folder.rglob("tiny-*.log"))

    def result(self, start: int) -> dict[str, object]:
        return dict(json.loads((self.folder / f"result-{start}.json").read_text()))


@pytest.fixture
def slurm(launch: Launch, tmp_path: Path, slurm_conf: Path, wait_for: WaitFor) -> Slurm:
    return Slurm(launch, tmp_path / "it's a folder", slurm_conf, wait_for)


def test_a_job_runs_the_script_in_its_own_ray_and_ends_with_its_exit_code(slurm: Slurm) -> None:
    override = "data.prompt_template='it is \"$x\" #1'"
    slurm.write_script(code=5)
    job = slurm.submit(override, "--log-dir", "the #1 50% logs")
    slurm.wait(job, "COMPLETED", "FAILED")
    log = slurm.folder / "the #1 50% logs" / f"tiny-{job}.log"
    assert slurm.field(job, "ExitCode") == "5:0", slurm.logs()
    assert slurm.result(0) == {
        "nodes": 1,
        "cpus": 1.0,
        "argv": [override],
        "spaced": "it's a #1 $HOME",
        "cwd": str(slurm.folder),
    }
    assert "Head node started." in log.read_text()
    assert [path.name for path in log.parent.iterdir() if path.suffix == ".pid"] == []


def waiting(slurm: Slurm) -> str:
    """A job that waits; its number."""
    slurm.write_script(waits=True)
    job = slurm.submit("--requeue")
    slurm.wait_for_file("waiting")
    return job


def test_a_requeued_job_starts_with_the_words_to_go_on(slurm: Slurm) -> None:
    job = waiting(slurm)
    slurm.ask("scontrol", "requeue", job)
    slurm.wait_for_file("result-1.json")
    slurm.wait(job, "COMPLETED")
    assert slurm.result(1)["argv"] == [
        f'reporting.run_dir="{slurm.folder}/runs/tiny"',
        "checkpointing.resume=same",
    ]


def test_a_job_near_its_time_limit_stops_cleanly_and_is_queued_again(slurm: Slurm) -> None:
    job = waiting(slurm)
    # What --signal=B:TERM@... does at the time limit, which Slurm counts in minutes.
    slurm.ask("scancel", "--batch", "--signal=TERM", job)
    slurm.wait_for_file("stopped")
    slurm.wait_for_file("result-1.json")
    slurm.wait(job, "COMPLETED")
    assert slurm.field(job, "Restarts") == "1"
    assert "queueing again" in slurm.logs()


def test_a_cancelled_job_stays_cancelled(slurm: Slurm) -> None:
    job = waiting(slurm)
    slurm.ask("scancel", job)
    slurm.wait(job, "CANCELLED")
    assert slurm.ask("squeue", "--noheader", "--jobs", job, "--states", "PENDING,RUNNING").strip() == ""
    assert slurm.field(job, "Restarts") == "0"


def test_what_slurm_refuses_is_an_error_with_its_reason(slurm: Slurm) -> None:
    done = slurm.launch("--partition", "nowhere")
    assert done.returncode == 2
    assert "Slurm refused the job" in done.stderr
    assert "invalid partition specified: nowhere" in done.stderr
