"""What the example submits and says, with a client that writes down what it is asked; real jobs are in test_jobs.py."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rlhf_ray import ConfigError, cli

EXAMPLE = Path(__file__).parents[2] / "examples" / "submit_job.py"


class FakeClient:
    """A job server with one job, which ends as it is told."""

    made: list[FakeClient]
    end = "SUCCEEDED"
    interrupted = False

    def __init__(self, address: str) -> None:
        self.address = address
        self.submitted: dict[str, Any] = {}
        self.stopped: list[str] = []
        type(self).made.append(self)

    def submit_job(self, **what: Any) -> str:
        self.submitted = what
        return "job_1"

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        yield "iteration 1\n"
        if self.interrupted:
            raise KeyboardInterrupt

    def get_job_logs(self, job: str) -> str:
        return f"log of {job}\n"

    def get_job_status(self, job: str) -> Any:
        from ray.job_submission import JobStatus

        return JobStatus("STOPPED" if self.stopped else self.end)

    def get_job_info(self, job: str) -> Any:
        return SimpleNamespace(status=self.get_job_status(job), message="It ended.\nAnd more.")

    def stop_job(self, job: str) -> None:
        self.stopped.append(job)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("submit_job", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def client(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> type[FakeClient]:
    fresh = type("Fake", (FakeClient,), {"made": []})
    monkeypatch.setattr(example, "JobSubmissionClient", fresh)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return fresh


def test_the_quickstart_is_submitted_so_that_it_goes_on(
    example: ModuleType, client: type[FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    assert example.main(["submit", "--run-dir", "/shared/it's", "training.iterations=5"]) == 0

    (made,) = client.made
    assert made.address == "http://127.0.0.1:8265"
    exec_, *words = shlex.split(made.submitted["entrypoint"])
    assert (exec_, *words[:2]) == ("exec", "rlhf-ray", "train")
    settings = cli.load_config(None, words[2:]).settings
    assert (settings.training.iterations, settings.reporting.run_dir) == (5, "/shared/it's")
    assert (settings.checkpointing.interval, settings.checkpointing.resume) == (10, "same")
    assert made.submitted["runtime_env"] == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "90"}}
    assert capsys.readouterr().out.splitlines()[1:] == ["iteration 1", "job_1 SUCCEEDED: It ended."]


def test_a_file_is_uploaded_with_its_folder_and_keeps_its_checkpoints(
    example: ModuleType, client: type[FakeClient], tmp_path: Path
) -> None:
    conf = tmp_path / "my conf.yaml"
    conf.write_text("checkpointing:\n  interval: 3\n")

    example.main(["--address", "http://head:8265", "submit", "--run-dir", "/r", str(conf), "training.lr=1e-5"])

    (made,) = client.made
    assert made.address == "http://head:8265"
    assert made.submitted["runtime_env"]["working_dir"] == str(tmp_path)
    assert shlex.split(made.submitted["entrypoint"])[3:] == [
        "./my conf.yaml",
        "training.lr=1e-5",
        "reporting.run_dir=/r",
        "checkpointing.resume=same",
    ]


def test_ctrl_c_stops_the_job(
    example: ModuleType, client: type[FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    client.interrupted = True

    assert example.main(["submit", "--run-dir", "/r"]) == 1

    assert client.made[0].stopped == ["job_1"]
    assert capsys.readouterr().out.endswith("job_1 STOPPED: It ended.\n")


def test_a_job_that_failed_is_a_failure(example: ModuleType, client: type[FakeClient]) -> None:
    client.end = "FAILED"

    assert example.main(["submit", "--run-dir", "/r"]) == 1
    assert example.main(["submit", "--run-dir", "/r", "--no-wait"]) == 0


@pytest.mark.parametrize(
    ("command", "said"), [("status", "job_2 SUCCEEDED: It ended.\n"), ("logs", "log of job_2\n"), ("stop", "")]
)
def test_a_job_is_looked_at_and_stopped(
    command: str, said: str, example: ModuleType, client: type[FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    assert example.main([command, "job_2"]) == 0

    assert capsys.readouterr().out == said
    assert client.made[0].stopped == (["job_2"] if command == "stop" else [])


def test_mistakes_are_found_before_anything_is_submitted(example: ModuleType, client: type[FakeClient]) -> None:
    with pytest.raises(ConfigError, match=r"training\.gamma"):
        example.main(["submit", "--run-dir", "/r", "training.gamma=2"])
    with pytest.raises(SystemExit):
        example.main(["submit", "--run-dir", "runs/first"])

    assert all(made.submitted == {} for made in client.made)
