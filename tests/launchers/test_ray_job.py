"""Jobs of a real cluster, with a script in the place of a training."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

Launch = Callable[..., "subprocess.CompletedProcess[str]"]
WaitFor = Callable[[Callable[[], object], str, float], None]

SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path

there = Path(os.environ["THERE"])
if "training.iterations=1" not in sys.argv:
    def stop(*_):
        time.sleep(4)  # Longer than the three seconds that Ray gives by itself.
        (there / "stopped").write_text("cleanly")
        sys.exit(143)
    signal.signal(signal.SIGTERM, stop)
    print("it waits", flush=True)
    (there / "waiting").write_text(str(os.getpid()))
    time.sleep(600)

import ray
ray.init()
said = {
    "argv": sys.argv[1:],
    "cpus": ray.cluster_resources()["CPU"],
    "files": sorted(str(path) for path in Path().rglob("*") if path.is_file()),
    "spaced": os.environ["SPACED"],
}
(there / "result.json").write_text(json.dumps(said))
print("it ran", flush=True)
sys.exit(int(os.environ["CODE"]))
"""
END = "training.iterations=1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "it's a folder"
    (folder / "runs" / "first" / "checkpoints").mkdir(parents=True)
    (folder / "runs" / "first" / "checkpoints" / "weights").write_text("large")
    (folder / "runs" / "first" / "config.yaml").write_text("")
    (folder / "a script.py").write_text(SCRIPT)
    return folder


def words(server: str, there: Path, *, code: int = 0) -> list[str]:
    env = (f"THERE={there}", "SPACED=it's a $HOME", f"CODE={code}")
    return ["a script.py", "--address", server, "--python", sys.executable, *(f"--env={each}" for each in env)]


def test_a_job_runs_what_was_uploaded_and_its_log_is_followed(
    launch: Launch, job_server: str, folder: Path, tmp_path: Path
) -> None:
    override = "data.prompt_template='it is \"$x\" #1'"

    done = launch("ray", *words(job_server, tmp_path), END, override, cwd=folder)

    assert done.returncode == 0, done.stderr
    assert "it ran\n" in done.stdout
    assert "submitted raysubmit_" in done.stderr
    assert json.loads((tmp_path / "result.json").read_text()) == {
        "argv": [END, override],
        "cpus": 1.0,
        "files": ["a script.py", "runs/first/config.yaml"],
        # As Ray has it: names in a value are replaced on the cluster.
        "spaced": f"it's a {Path.home()}",
    }


def test_the_exit_code_of_the_job_is_the_command_s(launch: Launch, ray_cluster: Any, folder: Path) -> None:
    # By the cluster's own address, not its job server's.
    server = f"127.0.0.1:{ray_cluster.port}"

    done = launch("ray", *words(server, folder, code=7), END, "--no-upload", cwd=folder)

    assert done.returncode == 7, done.stderr
    assert "failed" in done.stderr
    assert (folder / "result.json").exists()


@pytest.fixture
def waiting(job_server: str, folder: Path, tmp_path: Path, wait_for: WaitFor) -> Iterator[subprocess.Popen[str]]:
    """A launcher whose job waits for its end."""
    launcher = subprocess.Popen(
        [sys.executable, "-m", "rlhf_ray.launchers.ray", *words(job_server, tmp_path)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background passes on that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        wait_for((tmp_path / "waiting").exists, "job that waits", 60)
        assert launcher.stdout is not None
        assert any("it waits" in line for line in launcher.stdout)
        yield launcher
    finally:
        launcher.kill()
        launcher.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_stops_the_job_and_waits_for_its_clean_end(
    number: signal.Signals, waiting: subprocess.Popen[str], tmp_path: Path
) -> None:
    waiting.send_signal(number)
    _, said = waiting.communicate(timeout=60)

    assert waiting.returncode == 128 + number, said
    assert (tmp_path / "stopped").read_text() == "cleanly"
    assert " stopped\n" in said
    assert not Path(f"/proc/{(tmp_path / 'waiting').read_text()}").exists()


def test_a_job_that_someone_else_stops_ends_the_launcher_with_143(
    waiting: subprocess.Popen[str], job_server: str, tmp_path: Path
) -> None:
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(job_server)
    (job,) = [job for job in client.list_jobs() if job.submission_id and not job.status.is_terminal()]
    client.stop_job(job.submission_id)
    _, said = waiting.communicate(timeout=60)

    assert waiting.returncode == 143, said
    assert (tmp_path / "stopped").read_text() == "cleanly"


def test_ray_job_submit_runs_the_train_command(job_server: str, tmp_path: Path) -> None:
    """As far as its settings: what comes then is in the integration tests."""
    (tmp_path / "conf.yaml").write_text("training: {learning_rate: 1}\n")
    ray = str(Path(sys.executable).with_name("ray"))
    submit = [ray, "job", "submit", "--address", job_server, "--working-dir", str(tmp_path)]

    done = subprocess.run(
        [*submit, "--", "rlhf-ray", "train", "conf.yaml"], capture_output=True, text=True, timeout=120, check=False
    )

    assert done.returncode == 1
    assert "training.lr" in done.stdout
    assert "failed with exit code 2" in done.stdout + done.stderr
