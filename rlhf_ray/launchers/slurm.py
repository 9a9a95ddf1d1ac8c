"""Launch under Slurm: write a job that brings its own Ray, and submit it."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_ray.errors import ConfigError
from rlhf_ray.launchers.program import Program, environment
from rlhf_ray.launchers.sbatch import SlurmJob

if TYPE_CHECKING:
    from rlhf_ray.config.builder import AlgorithmConfig

__all__ = ["SUMMARY", "add_options", "run"]

SUMMARY = "submit a Slurm job that starts Ray on its nodes, runs there, and can be requeued and resumed"

_SUBMIT_TIMEOUT_S = 60.0
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII)
# minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]
_TIME_LIMIT = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|infinite|unlimited", re.IGNORECASE)
_PLAIN_YAML = re.compile(r"/[\w./+@-]*")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what only this backend knows."""
    add = parser.add_argument
    add("--job-name", metavar="NAME", help="name of job, log and run directory (default: the file's)")
    add("--nodes", type=_count, default=1, metavar="N", help="number of nodes (default: %(default)s)")
    add("--gpus-per-node", type=_count, metavar="N", help="GPUs on each node (default: none is asked for)")
    add("--cpus-per-task", type=_count, metavar="N", help="CPUs on each node (default: all that Slurm gives)")
    add("--partition", metavar="NAME", help="partition (default: the cluster's)")
    add("--account", metavar="NAME", help="account (default: the user's)")
    add("--time", metavar="LIMIT", help="time limit, such as 90 (minutes), 12:00:00 or 2-00 (default: the partition's)")
    add("--share-nodes", action="store_true", help="do not ask for whole nodes; no other Ray may run on them then")
    add(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="further #SBATCH line, such as mem=0 or constraint=a100; as often as needed",
    )
    add(
        "--requeue",
        action="store_true",
        help="queue again after preemption, a lost node or the time limit, and go on from the newest checkpoint in "
        "reporting.run_dir (default: runs/NAME); so does the same job when it is submitted again",
    )
    add(
        "--grace-s",
        type=_count,
        default=120,
        metavar="SECONDS",
        help="ask the program to stop this long before the time limit (default: %(default)s)",
    )
    add("--container-image", metavar="IMAGE", help="run in this image (pyxis); it must have ray and rlhf_ray")
    add(
        "--container-mounts",
        action="append",
        default=[],
        metavar="SRC:DST",
        help="mounts beside the working directory and the log folder; as often as needed",
    )
    add(
        "--setup",
        action="append",
        default=[],
        metavar="COMMAND",
        help="shell command before the start, such as 'module load cuda'; as often as needed",
    )
    add("--python", metavar="PATH", help="interpreter (default: this one; in a container: python)")
    add("--working-dir", metavar="DIR", default=".", help="folder to run in, seen by all nodes (default: this one)")
    add(
        "--log-dir",
        metavar="DIR",
        default="logs",
        help="folder of script and log (default: %(default)s in the working directory)",
    )
    add("--no-check", action="store_true", help="skip the check of the settings here: their files are on the cluster")
    add("--dry-run", action="store_true", help="print the script and submit nothing")


def run(args: argparse.Namespace) -> int:
    """Submit the job, or print its script.

    Raises:
        ConfigError: The command line or a setting is wrong, there is no Slurm here, or it refuses the job.
    """
    job = _job(args)
    text = job.script()
    if args.dry_run:
        sys.stdout.write(text)
        return 0
    if shutil.which("sbatch") is None:
        raise ConfigError("launch slurm", "sbatch", "not found on PATH; run this on a login node, or with --dry-run")
    job.log_dir.mkdir(parents=True, exist_ok=True)
    path = job.log_dir / f"{job.name}.sbatch"
    path.touch(mode=0o600)  # What --env sets may be nobody else's business.
    path.write_text(text, encoding="utf-8")
    job_id = _submit(path, job.working_dir)
    log = job.log.replace("%%", "%").replace("%j", job_id)
    sys.stdout.write(f"submitted job {job_id}\n  squeue --jobs {job_id}\n  tail -F {log}\n  scancel {job_id}\n")
    return 0


def _job(args: argparse.Namespace) -> SlurmJob:
    program = Program.of(args)
    working_dir = Path(os.path.abspath(args.working_dir))
    if not working_dir.is_dir():
        raise ConfigError("--working-dir", args.working_dir, "no such folder")
    if args.time is not None and not _TIME_LIMIT.fullmatch(args.time):
        raise ConfigError("--time", args.time, "write minutes, hours:minutes:seconds or days-hours")
    name = args.job_name or re.sub(r"[^\w.-]+", "-", program.path.stem, flags=re.ASCII).lstrip("-.") or "rlhf-ray"
    if not _NAME.fullmatch(name):
        raise ConfigError("--job-name", name, "use letters, digits, dots, dashes and underscores")
    config = program.configured(working_dir, validate=not args.no_check)
    ray_address = config.settings.resources.ray_address
    if ray_address not in (None, "auto"):
        raise ConfigError("resources.ray_address", ray_address, "leave it out: a job has its own Ray")
    if args.requeue:
        program = _going_on(program, config, working_dir / "runs" / name, working_dir)
    in_container = args.container_image is not None
    python = args.python or ("python" if in_container else sys.executable)
    return SlurmJob(
        name=name,
        command=tuple(program.command(python, working_dir=working_dir)),
        working_dir=working_dir,
        log_dir=working_dir / Path(args.log_dir).expanduser(),
        nodes=args.nodes,
        grace_s=args.grace_s,
        gpus_per_node=args.gpus_per_node,
        cpus_per_task=args.cpus_per_task,
        partition=args.partition,
        account=args.account,
        time_limit=args.time,
        share_nodes=args.share_nodes,
        extra=tuple(args.sbatch),
        container_image=args.container_image,
        container_mounts=tuple(args.container_mounts),
        env=environment(args.env),
        path=Path(python).parent if os.path.isabs(python) and not in_container else None,
        setup=tuple(args.setup),
        requeue=args.requeue,
    )


def _going_on(program: Program, config: AlgorithmConfig, usual: Path, working_dir: Path) -> Program:
    """Let every start of the job go on with one run.

    Args:
        program: What is started.
        config: Its settings, as far as they can be read here.
        usual: Run directory where the settings name none.
        working_dir: What a relative run directory is relative to.

    Raises:
        ConfigError: The settings write no checkpoints, or the run directory holds a run with other settings.
    """
    reporting, checkpointing = config.settings.reporting, config.settings.checkpointing
    if program.shows_settings and checkpointing.interval == 0:
        remedy = "a requeued job goes on from its newest checkpoint; give, for example, checkpointing.interval=20"
        raise ConfigError("checkpointing.interval", 0, remedy)
    if reporting.run_dir is None:
        program = program.with_override(f"reporting.run_dir={_yaml(str(usual))}")
    if checkpointing.resume != "never":
        return program
    if program.shows_settings:
        _check_run(working_dir / Path(reporting.run_dir or usual).expanduser(), config)
    return program.with_override("checkpointing.resume=same")


def _check_run(run_dir: Path, config: AlgorithmConfig) -> None:
    """Find settings that the run in a directory was not begun with: the job would end as soon as it starts."""
    from rlhf_ray.algorithm.resuming import check_same, resolved_yaml
    from rlhf_ray.reporting.run_directory import RunDirectory

    directory = RunDirectory(run_dir)
    if directory.config.exists() and RunDirectory.holds_a_run(str(run_dir)):
        check_same(directory, resolved_yaml(config))


def _yaml(path: str) -> str:
    """Write a path as the value of an override, which is read as YAML."""
    return path if _PLAIN_YAML.fullmatch(path) else json.dumps(path)


def _submit(script: Path, working_dir: Path) -> str:
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(script)],
            cwd=working_dir,
            capture_output=True,
            text=True,
            timeout=_SUBMIT_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise ConfigError("launch slurm", "sbatch", f"no answer within {_SUBMIT_TIMEOUT_S:g} s; try `sinfo`") from None
    if done.returncode != 0:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise ConfigError("launch slurm", str(script), f"Slurm refused the job: {said}")
    # With several clusters: number;cluster.
    return done.stdout.strip().partition(";")[0]


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    from rlhf_ray.cli import main

    sys.exit(main(["launch", "slurm", *sys.argv[1:]]))
