"""The command, with a program in the place of ``sbatch`` that writes down what it is given."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_ray import PPOConfig, cli
from rlhf_ray.algorithm.resuming import resolved_yaml
from rlhf_ray.reporting.run_directory import RunDirectory

StandIn = Callable[..., Path]
Words = Callable[[Path], list[str]]
CHECKPOINTS = "checkpointing.interval=5"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "it's here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "my conf.yaml").write_text("training:\n  iterations: 3\n")
    (folder / "train.py").write_text("")
    return folder


@pytest.fixture
def sbatch(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    program = stand_in("sbatch", then="echo '4711;cluster'")
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return program


def command_of(script: str) -> list[str]:
    (line,) = [line for line in script.splitlines() if line.startswith("command=(")]
    return shlex.split(line.removeprefix("command=(").removesuffix(")"))


def dry_run(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert cli.main(["launch", "slurm", *words, "--dry-run"]) == 0
    return command_of(capsys.readouterr().out)


def test_the_script_is_kept_beside_the_log_and_submitted(
    sbatch: Path, folder: Path, words_of: Words, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        cli.main(["launch", "slurm", "my conf.yaml", "--nodes", "2", "--gpus-per-node", "8", "training.lr=1e-6"]) == 0
    )

    script = folder / "logs" / "my-conf.sbatch"
    assert words_of(sbatch) == ["--parsable", str(script)]
    assert script.stat().st_mode & 0o077 == 0
    text = script.read_text()
    assert command_of(text)[1:] == ["-m", "rlhf_ray.cli", "train", "./my conf.yaml", "training.lr=1e-6"]
    assert command_of(text)[0] == sys.executable
    assert "#SBATCH --nodes=2\n" in text
    assert capsys.readouterr().out.splitlines() == [
        "submitted job 4711",
        "  squeue --jobs 4711",
        f"  tail -F {folder}/logs/my-conf-4711.log",
        "  scancel 4711",
    ]
    assert list(folder.glob("slurm-*.out")) == []


def test_a_dry_run_writes_nothing(sbatch: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.iterdir())

    dry_run(capsys, "my conf.yaml")

    assert sorted(folder.iterdir()) == before
    assert not Path(f"{sbatch}.args").exists()


def test_a_requeued_job_resumes_its_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # YAML would take the folder's name for the start of a quoted text otherwise.
    where = f'reporting.run_dir="{folder}/runs/my-conf"'
    assert dry_run(capsys, "my conf.yaml", "--requeue", CHECKPOINTS)[5:] == [
        CHECKPOINTS,
        where,
        "checkpointing.resume=same",
    ]
    overrides = ["reporting.run_dir=elsewhere", "checkpointing.resume=any", CHECKPOINTS]
    assert dry_run(capsys, "my conf.yaml", "--requeue", *overrides)[5:] == overrides


def test_the_words_of_a_requeued_job_are_settings(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = dry_run(capsys, "my conf.yaml", "--requeue", CHECKPOINTS)

    settings = cli.load_config(command[4], command[5:]).settings
    assert settings.reporting.run_dir == str(folder / "runs" / "my-conf")
    assert settings.checkpointing.resume == "same"


def test_a_script_is_given_where_and_how_it_resumes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = dry_run(capsys, "train.py", "--requeue", "--job-name", "first")

    assert command[1:] == ["./train.py", f'reporting.run_dir="{folder}/runs/first"', "checkpointing.resume=same"]


def test_a_job_that_is_not_requeued_starts_as_it_was_asked_to(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run(capsys, "my conf.yaml")[4:] == ["./my conf.yaml"]


def a_run(folder: Path, **training: int) -> None:
    """What the launcher's own job leaves that was begun at a terminal."""
    config = PPOConfig().training(**training).checkpointing(interval=5).reporting(progress="live")
    RunDirectory.create(str(folder), algorithm="ppo").write_config(resolved_yaml(config))


def test_the_same_job_can_be_submitted_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(folder / "runs" / "my-conf", iterations=3)

    command = dry_run(capsys, "my conf.yaml", "--requeue", CHECKPOINTS)

    assert command[-1] == "checkpointing.resume=same"


def test_another_job_in_the_run_directory_is_refused_before_it_waits(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a_run(folder / "runs" / "my-conf", iterations=4)
    words = ["launch", "slurm", "my conf.yaml", "--requeue", "--dry-run", CHECKPOINTS]

    assert cli.main(words) == 2

    assert "training.iterations is 4 there and 3 here" in capsys.readouterr().err
    assert cli.main([*words, "reporting.run_dir=runs/my-conf", "checkpointing.resume=any"]) == 0


def test_a_container_has_its_own_python(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["my conf.yaml", "--container-image", "a:b"]
    assert dry_run(capsys, *words)[0] == "python"
    assert dry_run(capsys, *words, "--python", "/opt/bin/python")[0] == "/opt/bin/python"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["training.gamma=2"], "training.gamma"),
        (["--time", "soon"], "write minutes, hours:minutes:seconds or days-hours"),
        (["--job-name", "a b"], "--job-name = 'a b'"),
        (["--working-dir", "nowhere"], "no such folder"),
        (["resources.ray_address=10.0.0.1:6379"], "a job has its own Ray"),
        (["--requeue"], "checkpointing.interval = 0: a requeued job resumes from its newest checkpoint"),
        (["--partition", "a\\b"], "--partition"),
    ],
)
def test_mistakes_are_found_before_anything_is_submitted(
    words: list[str], told: str, sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["launch", "slurm", "my conf.yaml", *words]) == 2

    assert told in capsys.readouterr().err
    assert not Path(f"{sbatch}.args").exists()


@pytest.mark.parametrize("option", ["--nodes", "--gpus-per-node", "--cpus-per-task", "--grace-s"])
@pytest.mark.parametrize("value", ["0", "two", "1.5"])
def test_numbers_are_numbers(option: str, value: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["launch", "slurm", "my conf.yaml", option, value])

    assert end.value.code == 2
    assert f"argument {option}: '{value}' must be an integer" in capsys.readouterr().err


@pytest.mark.parametrize("limit", ["90", "90:30", "12:00:00", "2-00", "2-12:30:00", "infinite"])
def test_time_limits_are_those_of_slurm(limit: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["launch", "slurm", "my conf.yaml", "--time", limit, "--dry-run"]) == 0

    assert re.search(rf"^#SBATCH --time={limit}$", capsys.readouterr().out, re.MULTILINE)


def test_a_machine_without_slurm_is_an_error_with_a_way_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(folder))

    assert cli.main(["launch", "slurm", "my conf.yaml"]) == 2

    assert "run this on a login node, or with --dry-run" in capsys.readouterr().err
    assert not (folder / "logs").exists()


def test_what_slurm_says_is_the_error(stand_in: StandIn, sbatch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in("sbatch", then="echo 'sbatch: error: no\n such thing' >&2; exit 1")

    assert cli.main(["launch", "slurm", "my conf.yaml"]) == 2

    assert "Slurm refused the job: sbatch: error: no such thing" in capsys.readouterr().err
