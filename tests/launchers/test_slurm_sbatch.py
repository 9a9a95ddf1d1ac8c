"""The script's text, and what bash makes of it; Slurm's own reading of it is in ``test_slurm_job.py``."""

from __future__ import annotations

import argparse
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.errors import ConfigError
from rlhf_ray.launchers.slurm import SlurmJob, add_slurm

FOLDER = Path("/shared/it's #1")


def job(**more: Any) -> SlurmJob:
    usual: dict[str, Any] = {
        "name": "tiny",
        "command": ("python", "-m", "rlhf_ray.cli", "train", "./conf.yaml"),
        "working_dir": FOLDER,
        "log_dir": FOLDER / "logs",
        "env": {},
        "path": None,
    }
    parser = argparse.ArgumentParser()
    add_slurm(parser.add_subparsers())
    options = parser.parse_args(["slurm", "--nodes", "2"])
    for name in more.keys() - usual.keys():
        assert hasattr(options, name)
        setattr(options, name, more[name])
    return SlurmJob(**{name: more.get(name, value) for name, value in usual.items()}, options=options)


def directives(script: str) -> list[str]:
    lines = script.splitlines()
    return [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]


def values_of(script: str, name: str) -> list[str]:
    """An array of the script, as bash reads it."""
    (line,) = [line for line in script.splitlines() if line.startswith(f"{name}=(")]
    program = f'{line}\nfor word in "${{{name}[@]}}"; do printf \'%s\\0\' "$word"; done'
    said = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True).stdout
    return said.split("\0")[:-1]


def test_options_come_before_everything_else() -> None:
    script = job().script()

    assert script.startswith("#!/bin/bash\n#SBATCH --job-name=tiny\n")
    assert directives(script) == [
        "--job-name=tiny",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--exclusive",
        f'--output="{FOLDER}/logs/tiny-%j.log"',
        "--signal=B:TERM@120",
        "--no-requeue",
        "--open-mode=append",
    ]


def test_every_option_that_is_asked_for_is_there() -> None:
    script = job(
        gpus_per_node=8,
        cpus_per_task=32,
        partition="gpu",
        account="team",
        time="2-00:30",
        share_nodes=True,
        requeue=True,
        sbatch=("mem=0", "--constraint=a100", "#SBATCH -q high"),
    ).script()

    wanted = ["--gpus-per-node=8", "--cpus-per-task=32", "--partition=gpu", "--account=team", "--time=2-00:30"]
    found = directives(script)
    assert [line for line in found if line in wanted] == wanted
    assert found[-3:] == ["--mem=0", "--constraint=a100", "-q high"]
    assert "--exclusive" not in found
    assert "--requeue" in found
    assert values_of(script, "ray_options") == ["--num-gpus", "8"]


@pytest.mark.parametrize("requeue", [True, False])
def test_bash_understands_the_script(requeue: bool, tmp_path: Path) -> None:
    script = job(requeue=requeue, container_image="a:b", env={"A": "b"}, setup=("module load cuda",)).script()

    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert ("requeue=yes" in script.splitlines()) == requeue


def test_ray_runs_on_every_node_and_the_program_within_it() -> None:
    script = job().script()

    assert "ray symmetric-run" in script
    assert '--min-nodes "$SLURM_JOB_NUM_NODES"' in script
    assert values_of(script, "ray_options") == []


def test_words_reach_the_program_as_they_are() -> None:
    command = ("python", "it's.py", 'a.b="x $HOME `id`"', "a.c=#1 \\ ü")

    assert tuple(values_of(job(command=command).script(), "command")) == command


def test_the_environment_is_set_after_the_user_s_own_commands_in_the_folder_of_the_run() -> None:
    script = job(setup=("module load cuda",), path=Path("/opt/my env/bin"), env={"A": "it's $HOME"}).script()

    lines = script.splitlines()
    wanted = [
        "cd '/shared/it'\"'\"'s #1'",
        "set +o nounset",
        "module load cuda",
        "set -o nounset",
        "export PATH='/opt/my env/bin':$PATH",
        "export A='it'\"'\"'s $HOME'",
    ]
    start = lines.index(wanted[0])
    assert lines[start : start + len(wanted)] == wanted


def preparation(script: str) -> str:
    """What comes between the options and the start of Ray, as a script."""
    start = script.index("set -o errexit")
    return script[start : script.index("# What every job of")]


def test_a_set_up_command_may_read_what_is_not_set_and_the_rest_may_not(tmp_path: Path) -> None:
    activate = 'MARK=$PS1_OF_CONDA; [ -z "$MARK" ]'
    prepared = preparation(job(working_dir=tmp_path, setup=(activate, 'echo "set up"')).script())

    done = subprocess.run(["bash", "-c", f"{prepared}\necho $NOT_SET"], env={}, capture_output=True, text=True)

    assert done.stdout == "set up\n"
    assert "NOT_SET: unbound variable" in done.stderr


def test_a_set_up_command_that_fails_ends_the_job(tmp_path: Path) -> None:
    prepared = preparation(job(working_dir=tmp_path, setup=("false",)).script())

    done = subprocess.run(["bash", "-c", f"{prepared}\necho went on"], capture_output=True, text=True)

    assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.parametrize(
    ("given", "mode", "length"),
    [({}, "token", 64), ({"RAY_AUTH_TOKEN": "mine"}, "token", 4), ({"RAY_AUTH_MODE": "disabled"}, "disabled", 0)],
)
def test_only_the_job_knows_the_token_of_its_ray(given: dict[str, str], mode: str, length: int) -> None:
    script = job().script()
    start = script.index("export RAY_AUTH_MODE")
    program = script[start : script.index("fi\n", start) + 3] + 'echo "$RAY_AUTH_MODE ${RAY_AUTH_TOKEN:-}"'

    env = {"PATH": os.environ["PATH"], **given}
    said = subprocess.run(["bash", "-euc", program], env=env, capture_output=True, text=True, check=True).stdout

    found, _, token = said.removesuffix("\n").partition(" ")
    assert (found, len(token)) == (mode, length)


def leftovers(script: str, *, job: str, count: str) -> None:
    """Run what comes before a further start, as on a node of the job; srun is its command, a step after the other."""
    start = script.index("if ((${SLURM_RESTART_COUNT:-0} > 0)); then")
    program = (
        'srun() { while [[ $1 == --* ]]; do shift; done; "$@"; }\n' + script[start : script.index("\nfi\n", start) + 4]
    )
    env = {"PATH": os.environ["PATH"], "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": count}
    subprocess.run(["bash", "-euc", program], env=env, check=True, timeout=60)


def test_a_further_start_ends_what_an_earlier_one_left_and_nothing_else() -> None:
    of_job = {"SLURM_JOB_ID": "999999991"}
    env = {
        "first start": of_job,
        "second start": of_job | {"SLURM_RESTART_COUNT": "1"},
        "this start": of_job | {"SLURM_RESTART_COUNT": "2"},
        "other job": {"SLURM_JOB_ID": "999999992"},
        "no job": {},
    }
    running = {
        name: subprocess.Popen(["sleep", "60"], env={"PATH": os.environ["PATH"], **each}) for name, each in env.items()
    }
    try:
        leftovers(job(requeue=True).script(), job="999999991", count="2")

        assert [running[name].wait(10) for name in ("first start", "second start")] == [-9, -9]
        assert [running[name].poll() for name in ("this start", "other job", "no job")] == [None] * 3
    finally:
        for process in running.values():
            process.kill()
            process.wait()


def test_a_container_sees_the_folders_of_the_run() -> None:
    script = job(container_image="nvcr.io#a/b:1", container_mounts=("/data:/data:ro",)).script()

    assert values_of(script, "srun_options") == [
        "--container-image=nvcr.io#a/b:1",
        f"--container-mounts={FOLDER}:{FOLDER},{FOLDER}/logs:{FOLDER}/logs,/data:/data:ro",
        f"--container-workdir={FOLDER}",
    ]
    assert values_of(job().script(), "srun_options") == []


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"partition": "a\\b"}, "--partition"),
        ({"log_dir": Path("/a\nb")}, "--output"),
        ({"sbatch": ("",)}, "--sbatch"),
        ({"sbatch": ("mem=0\n#SBATCH --time=1",)}, "--sbatch"),
    ],
)
def test_what_slurm_cannot_read_is_an_error(more: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        job(**more).script()


def test_a_percent_sign_of_a_folder_is_no_pattern_of_slurm() -> None:
    assert job(log_dir=Path("/a/50%")).log == "/a/50%%/tiny-%j.log"
