"""What is submitted, without a cluster."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, TextIO

import pytest

from rlhf_ray import cli

Launch = Callable[..., "subprocess.CompletedProcess[str]"]


class FakeJob:
    """Stands where the submitted job stands."""

    job_id = "job_1"
    submitted: dict[str, Any]
    followed: bool

    @classmethod
    def submit(cls, address: str, **what: Any) -> FakeJob:
        cls.submitted = {"address": address, **what}
        cls.followed = False
        return cls()

    def how_to_look(self) -> str:
        return "  ray job logs"

    def follow(self, out: TextIO, *, stop_timeout_s: float) -> int:
        type(self).followed = True
        return 5


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[FakeJob]:
    from rlhf_ray.launchers import ray_job

    folder = tmp_path / "it's here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_job, "RayJob", FakeJob)
    (folder / "conf.yaml").write_text("training:\n  iterations: 3\n")
    (folder / "train.py").write_text("")
    return FakeJob


def test_a_folder_is_uploaded_and_the_program_runs_in_it(job: type[FakeJob]) -> None:
    assert cli.main(["launch", "ray", "conf.yaml", "reporting.run_dir=/shared/it's", "--exclude", "*.bin"]) == 5

    sent = job.submitted
    assert sent["address"] == "http://127.0.0.1:8265"
    assert sent["entrypoint"] == (
        "exec python -m rlhf_ray.cli train ./conf.yaml 'reporting.run_dir=/shared/it'\"'\"'s'"
    )
    assert sent["runtime_env"]["working_dir"] == str(Path.cwd())
    assert sent["runtime_env"]["excludes"][-1] == "*.bin"
    assert "/runs/*/checkpoints" in sent["runtime_env"]["excludes"]
    assert job.followed


def test_what_both_sides_see_is_not_uploaded(job: type[FakeJob], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["launch", "ray", "train.py", "--config", "conf.yaml", "--no-upload", "--python", "/opt/env/bin/python"]

    assert cli.main([*words, "--no-wait"]) == 0

    folder = str(Path.cwd()).replace("'", "'\"'\"'")
    assert job.submitted["entrypoint"] == f"cd '{folder}' && exec /opt/env/bin/python ./train.py --config ./conf.yaml"
    assert job.submitted["runtime_env"].keys() == {"env_vars"}
    assert not job.followed
    assert "submitted job_1\n  ray job logs\n" in capsys.readouterr().err


def test_the_job_gets_its_variables_and_time_to_stop(job: type[FakeJob]) -> None:
    cli.main(["launch", "ray", "conf.yaml", "--env", "A=b c", "--env", "RAY_JOB_STOP_WAIT_TIME_S=300"])

    assert job.submitted["runtime_env"]["env_vars"] == {"A": "b c", "RAY_JOB_STOP_WAIT_TIME_S": "300"}
    cli.main(["launch", "ray", "conf.yaml"])
    assert int(job.submitted["runtime_env"]["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60


def test_the_address_comes_from_the_command_line_or_the_environment(
    job: type[FakeJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://one:8265")
    cli.main(["launch", "ray", "conf.yaml"])
    assert job.submitted["address"] == "http://one:8265"
    cli.main(["launch", "ray", "conf.yaml", "--address", "http://two:8265"])
    assert job.submitted["address"] == "http://two:8265"


@pytest.mark.parametrize(
    ("words", "warns"),
    [
        ([], True),
        (["reporting.run_dir=runs/first"], True),
        (["reporting.run_dir=/shared/first"], False),
        (["--no-upload"], False),
    ],
)
def test_a_run_directory_that_goes_with_the_job_is_warned_of(
    words: list[str], warns: bool, job: type[FakeJob], capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["launch", "ray", "conf.yaml", *words])

    assert ("stays in a temporary folder of the cluster" in capsys.readouterr().err) == warns


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["conf.yaml", "training.gamma=2"], "training.gamma"),
        (["conf.yaml", "--working-dir", "nowhere"], "--working-dir = 'nowhere': no such folder"),
        (["conf.yaml", "--working-dir", "/usr"], "which is all that is uploaded"),
        (["conf.yaml", "--env", "A"], "write NAME=VALUE"),
    ],
)
def test_mistakes_are_found_before_anything_is_submitted(
    words: list[str], told: str, job: type[FakeJob], capsys: pytest.CaptureFixture[str]
) -> None:
    job.submitted = {}

    assert cli.main(["launch", "ray", *words]) == 2

    assert told in capsys.readouterr().err
    assert job.submitted == {}


def test_files_of_the_cluster_need_not_be_here(job: type[FakeJob]) -> None:
    words = ["launch", "ray", "conf.yaml", "data.path=/shared/train.jsonl", "training.gamma=2"]

    assert cli.main(words) == 2
    assert cli.main([*words, "--no-check"]) == 5


def test_an_address_that_does_not_answer_is_an_error(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "conf.yaml").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"

    done = launch("ray", "conf.yaml", "--address", address)

    assert done.returncode == 2
    assert f"--address = '{address}': no Ray job server answers there" in done.stderr


class Locked(BaseHTTPRequestHandler):
    """A job server that wants to be shown a token."""

    def do_GET(self) -> None:
        self.send_response(401)
        self.end_headers()
        self.wfile.write(b"Unauthorized: Missing authentication token")

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_cluster_that_asks_for_a_token_is_an_error_that_says_how_to_show_it(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "conf.yaml").write_text("")
    with HTTPServer(("127.0.0.1", 0), Locked) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = launch("ray", "conf.yaml", "--address", f"http://127.0.0.1:{server.server_port}")
        server.shutdown()

    assert done.returncode == 2, done.stderr
    assert "it asks for a token; set RAY_AUTH_MODE=token" in done.stderr


class Fleeting(BaseHTTPRequestHandler):
    """A job server that ends the connection when it is given a job."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""}')

    def do_POST(self) -> None:
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_connection_that_is_lost_on_submission_is_an_error_that_says_where_to_look(
    launch: Launch, tmp_path: Path
) -> None:
    (tmp_path / "conf.yaml").write_text("")
    with HTTPServer(("127.0.0.1", 0), Fleeting) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        done = launch("ray", "conf.yaml", "--no-upload", "--address", address)
        server.shutdown()

    assert done.returncode == 1, done.stderr
    assert "broke off the submission" in done.stderr
    assert f"`ray job list --address {address}` shows whether the job is there" in done.stderr
    assert "Traceback" not in done.stderr


class Refusing(Fleeting):
    """A job server that takes no job."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(400)
        self.end_headers()
        self.wfile.write(b"no such job here")


def test_what_the_cluster_refuses_is_an_error_with_its_reason(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "conf.yaml").write_text("")
    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        # Counts more for Ray than what it is told.
        other = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1"}
        done = launch("ray", "conf.yaml", "--no-upload", "--address", address, **other)
        server.shutdown()

    assert done.returncode == 2, done.stderr
    assert "the job cannot be submitted" in done.stderr
    assert "no such job here" in done.stderr
