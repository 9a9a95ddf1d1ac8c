"""Trainings as jobs of a running cluster: to the end, and stopped and submitted again; real engines and learners."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.usefixtures("no_session_in_this_process")]

WaitFor = Callable[[Callable[[], object], str, float], None]

EXAMPLE = Path(__file__).parents[2] / "examples" / "submit_job.py"
SMALL = [
    "data.batch_size=8",
    "rollouts.group_size=4",
    "rollouts.max_prompt_tokens=16",
    "rollouts.num_threads=1",
    "learners.num_threads=1",
    "learners.max_tokens_per_microbatch=256",
]


@pytest.fixture(scope="module")
def cluster(start_job_cluster: Callable[..., AbstractContextManager[Any]]) -> Iterator[Any]:
    with start_job_cluster(num_cpus=4, object_store_bytes=300_000_000) as cluster:
        yield cluster


@pytest.fixture
def nothing_is_left(cluster: Any, wait_for: WaitFor) -> Callable[[], None]:
    """Check that every process and actor that a job began has ended, but for Ray's own."""
    before = {process.pid for process in cluster.processes()}

    def check() -> None:
        from ray.util.state import list_actors

        def left() -> list[str]:
            return [" ".join(each.cmdline())[:100] for each in cluster.processes() if each.pid not in before]

        try:
            wait_for(lambda: not left(), "end of the job's processes", 30)
        except AssertionError as error:
            raise AssertionError(f"{error}: {left()}") from error
        actors = list_actors(address=cluster.job_server, filters=[("state", "=", "ALIVE")])
        assert {actor.class_name for actor in actors} <= set(cluster.stay)

    return check


def submit_job(cluster: Any, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLE), "--address", cluster.job_server, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_job_trains_to_its_end(cluster: Any, tmp_path: Path, nothing_is_left: Callable[[], None]) -> None:
    run_dir = tmp_path / "run"

    done = submit_job(cluster, "submit", "--run-dir", str(run_dir), "training.iterations=1", *SMALL)

    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "SUCCEEDED" in done.stdout.splitlines()[-1]
    assert f"run directory  {run_dir}" in done.stdout
    assert [row["training_iteration"] for row in rows(run_dir)] == [1]
    assert rows(run_dir)[0]["learner/sampling_logprob_diff_max"] < 1e-3
    assert (run_dir / "model" / "model.safetensors").is_file()
    nothing_is_left()


def test_a_job_that_was_stopped_and_is_submitted_again_goes_on(
    cluster: Any, tmp_path: Path, nothing_is_left: Callable[[], None], wait_for: WaitFor
) -> None:
    from ray.job_submission import JobStatus, JobSubmissionClient

    run_dir = tmp_path / "run"
    iterations = 12
    training = [f"training.iterations={iterations}", "checkpointing.interval=2", *SMALL]
    going_on = [f"reporting.run_dir={run_dir}", "checkpointing.resume=same"]
    client = JobSubmissionClient(cluster.job_server)
    train = shlex.join(["rlhf-ray", "train", *training, *going_on])
    job = client.submit_job(
        # Ray knows no exit code of a job that it stopped: the shell, which gets SIGTERM too, says it.
        entrypoint=f"trap : TERM; {train}; echo code=$?",
        runtime_env={"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "90"}},
    )

    def saved() -> bool:
        assert not client.get_job_status(job).is_terminal(), client.get_job_logs(job)[-3000:]
        return any(run_dir.glob("checkpoints/*/manifest.json"))

    wait_for(saved, "checkpoint", 300)
    assert submit_job(cluster, "stop", job).returncode == 0

    assert client.get_job_status(job) == JobStatus.STOPPED
    log = client.get_job_logs(job).splitlines()
    assert f"stopping; what the run wrote is in {run_dir}" in log, log[-50:]
    assert log[-1] == "code=143"
    assert not any("Traceback" in line for line in log)
    nothing_is_left()
    newest = max(int(path.parent.name[-6:]) for path in run_dir.glob("checkpoints/*/manifest.json"))
    before = rows(run_dir)[:newest]
    assert len(before) == newest < iterations

    done = submit_job(cluster, "submit", "--run-dir", str(run_dir), *training)

    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    after = rows(run_dir)
    assert after[:newest] == before
    assert [row["training_iteration"] for row in after] == list(range(1, iterations + 1))
    nothing_is_left()
