"""The run takes the place of the command; no Ray is started here."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_ray import cli

Launch = Callable[..., "subprocess.CompletedProcess[str]"]

SCRIPT = """
import json, os, sys
print(json.dumps({"argv": sys.argv[1:], "ray": os.environ.get("RAY_ADDRESS"), "more": os.environ.get("MORE")}))
sys.exit(7)
"""


@pytest.fixture
def said(launch: Launch, tmp_path: Path) -> Callable[..., dict[str, object]]:
    (tmp_path / "script.py").write_text(SCRIPT)

    def said(*words: str, **env: str) -> dict[str, object]:
        done = launch("local", "script.py", *words, **env)
        assert done.returncode == 7, done.stderr
        return dict(json.loads(done.stdout))

    return said


def on_record(folder: Path, address: str) -> Path:
    """What `ray start` leaves."""
    record = folder / "ray" / "ray_current_cluster"
    record.parent.mkdir()
    record.write_text(address)
    return record


def test_the_script_gets_its_words_and_its_exit_code_is_the_command_s(
    said: Callable[..., dict[str, object]], tmp_path: Path
) -> None:
    (tmp_path / "conf.yaml").write_text("")

    found = said("training.lr=1e-5", "--config", "conf.yaml", "--env", "MORE=a b", "reporting.run_dir=it's here")

    argv = ["--config", "./conf.yaml", "training.lr=1e-5", "reporting.run_dir=it's here"]
    assert found == {"argv": argv, "ray": None, "more": "a b"}


def test_a_ray_that_runs_here_is_joined(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    with socket.create_server(("127.0.0.1", 0)) as ray:
        address = f"127.0.0.1:{ray.getsockname()[1]}"
        on_record(tmp_path, address)

        done = launch("local", "script.py")

    assert json.loads(done.stdout)["ray"] == "auto"
    assert done.stderr == f"joining the Ray at {address}\n"


def test_an_address_that_is_given_counts_more(said: Callable[..., dict[str, object]], tmp_path: Path) -> None:
    on_record(tmp_path, "127.0.0.1:1")

    assert said("--address", "local")["ray"] == "local"
    assert said(RAY_ADDRESS="10.0.0.1:6379")["ray"] == "10.0.0.1:6379"
    assert said("--address", "local", RAY_ADDRESS="10.0.0.1:6379")["ray"] == "local"


def test_a_ray_that_is_gone_is_an_error_that_names_its_record(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    record = on_record(tmp_path, "127.0.0.1:1")

    done = launch("local", "script.py")

    assert done.returncode == 2
    assert f"on record in {record}, does not answer" in done.stderr
    assert done.stdout == ""


def test_a_configuration_becomes_a_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(os, "execve", lambda path, command, variables: started.append((path, command)))
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf.yaml").write_text("")

    cli.main(["launch", "local", "conf.yaml", "training.iterations=1"])

    train = [sys.executable, "-m", "rlhf_ray.cli", "train", "./conf.yaml", "training.iterations=1"]
    assert started == [(sys.executable, train)]


def test_a_wrong_setting_starts_nothing(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)

    done = launch("local", "script.py", "training.gama=1")

    assert done.returncode == 2
    assert "training.gamma" in done.stderr
    assert done.stdout == ""
