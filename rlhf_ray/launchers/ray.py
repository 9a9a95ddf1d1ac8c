"""Launch on a running Ray cluster: upload, submit as a Ray job, follow its log, and end as it ends."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from rlhf_ray.errors import ConfigError
from rlhf_ray.launchers.program import Program, environment

__all__ = ["SUMMARY", "add_options", "run"]

SUMMARY = "run as a job of a running Ray cluster and follow its log; Ctrl-C stops the job"

_DEFAULT_ADDRESS = "http://127.0.0.1:8265"
# Patterns as in .gitignore, which Ray respects too. A run's config.yaml travels: it can be what is launched.
_NEVER_UPLOADED = (
    ".git",
    ".venv",
    "__pycache__",
    *(f"/runs/*/{part}" for part in ("checkpoints", "completions", "model", "tensorboard", "timeline", "wandb")),
)
# Ray kills what has not ended 3 s after SIGTERM; a run stops engines and learners first, and a checkpoint is finished.
_STOP_WAIT_S = 90
# How long after that the job is looked at before it is left to itself.
_LAST_LOOK_S = 15


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what only this backend knows."""
    parser.add_argument(
        "--address",
        metavar="URL",
        help=f"job server of the cluster, its dashboard (default: RAY_ADDRESS, else {_DEFAULT_ADDRESS})",
    )
    parser.add_argument(
        "--working-dir", metavar="DIR", default=".", help="folder that is uploaded and run in (default: this one)"
    )
    parser.add_argument(
        "--no-upload", action="store_true", help="upload nothing: the cluster sees the same folders as this machine"
    )
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="files that are not uploaded, as in .gitignore, which is respected too; as often as needed",
    )
    parser.add_argument(
        "--python", metavar="PATH", default="python", help="interpreter on the cluster (default: %(default)s)"
    )
    parser.add_argument(
        "--no-check", action="store_true", help="skip the check of the settings here: their files are on the cluster"
    )
    parser.add_argument("--no-wait", action="store_true", help="submit, say how to look at the job, and return")


def run(args: argparse.Namespace) -> int:
    """Submit the job, and unless told otherwise follow it to its end.

    Returns:
        0 if the job succeeded, else its own exit code, or 1 where Ray knows none.

    Raises:
        ConfigError: The command line or a setting is wrong, the cluster does not answer, or refuses the job.
    """
    program = Program.of(args)
    working_dir = Path(os.path.abspath(args.working_dir))
    if not working_dir.is_dir():
        raise ConfigError("--working-dir", args.working_dir, "no such folder")
    runtime_env = _runtime_env(args, working_dir)
    entrypoint = _entrypoint(program, args, working_dir)
    run_dir = program.configured(working_dir, validate=not args.no_check).settings.reporting.run_dir
    if not (args.no_upload or program.is_script or (run_dir and Path(run_dir).is_absolute())):
        sys.stderr.write(
            "warning: reporting.run_dir is not an absolute path; what the run writes stays in a temporary folder "
            "of the cluster\n"
        )
    # Ray is imported only now: mistakes answer at once.
    from rlhf_ray.launchers.ray_job import RayJob

    job = RayJob.submit(
        args.address or os.environ.get("RAY_ADDRESS") or _DEFAULT_ADDRESS,
        entrypoint=entrypoint,
        runtime_env=runtime_env,
    )
    sys.stderr.write(f"submitted {job.job_id}\n{job.how_to_look()}\n")
    return 0 if args.no_wait else job.follow(sys.stdout, stop_timeout_s=_STOP_WAIT_S + _LAST_LOOK_S)


def _entrypoint(program: Program, args: argparse.Namespace, working_dir: Path) -> str:
    command = shlex.join(program.command(args.python, working_dir=working_dir, only_inside=not args.no_upload))
    if args.no_upload:
        return f"cd {shlex.quote(str(working_dir))} && exec {command}"
    # Without exec a shell would be what Ray watches, and pass no signal's exit code on.
    return f"exec {command}"


def _runtime_env(args: argparse.Namespace, working_dir: Path) -> dict[str, Any]:
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S), **environment(args.env)}
    if args.no_upload:
        return {"env_vars": variables}
    return {
        "env_vars": variables,
        "working_dir": str(working_dir),
        "excludes": [*_NEVER_UPLOADED, *args.exclude],
    }


if __name__ == "__main__":
    from rlhf_ray.cli import main

    sys.exit(main(["launch", "ray", *sys.argv[1:]]))
