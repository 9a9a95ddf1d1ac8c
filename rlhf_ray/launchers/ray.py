"""Launch on a running Ray cluster: upload, submit as a Ray job, follow its log, and end as it ends."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from rlhf_ray.command import Commands, say
from rlhf_ray.launchers.program import REPEATED, Program, add_backend, main

__all__ = ["add_ray"]

_DEFAULT_ADDRESS = "http://127.0.0.1:8265"
# Patterns as in .gitignore, which Ray respects too. A run's config.yaml is uploaded: it can be what is launched.
_NEVER_UPLOADED = (
    ".git",
    ".venv",
    "__pycache__",
    *(f"/runs/*/{part}" for part in ("checkpoints", "completions", "model", "tensorboard", "timeline", "wandb")),
)
# Ray kills what has not ended 3 s after SIGTERM; a run stops engines and learners first, and a checkpoint is finished.
_STOP_WAIT_S = 90
# How long after that the job is watched before it is left to itself.
_LAST_LOOK_S = 15


def add_ray(backends: Commands) -> None:
    """Add ``rlhf-ray launch ray``."""
    summary = "run as a job of a running Ray cluster and follow its log; Ctrl-C stops the job"
    add = add_backend(backends, "ray", _run, summary).add_argument
    add(
        "--address",
        metavar="URL",
        help=f"job server of the cluster, its dashboard (default: RAY_ADDRESS, else {_DEFAULT_ADDRESS})",
    )
    add("--working-dir", metavar="DIR", help="folder that is uploaded and run in (default: this one)")
    add("--no-upload", action="store_true", help="upload nothing: the cluster sees the same folders as this machine")
    add(
        "--exclude",
        metavar="PATTERN",
        help="files that are not uploaded, as in .gitignore, which is respected too; as often as needed",
        **REPEATED,
    )
    add("--python", metavar="PATH", default="python", help="interpreter on the cluster (default: %(default)s)")
    add("--no-check", action="store_true", help="skip the check of the settings here: their files are on the cluster")
    add("--no-wait", action="store_true", help="submit, say how to look at the job, and return")


def _run(args: argparse.Namespace) -> int:
    """Submit the job, and unless told otherwise follow it to its end.

    Returns:
        0 if the job succeeded, else its own exit code, or 1 where Ray knows none.

    Raises:
        ConfigError: The command line or a setting is wrong, the cluster does not answer, or refuses the job.
    """
    program = Program.of(args)
    # Without exec a shell would be what Ray watches, and pass no signal's exit code on.
    entrypoint = f"exec {shlex.join(program.command(args.python, only_inside=not args.no_upload))}"
    runtime_env: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S), **program.variables}}
    if args.no_upload:
        entrypoint = f"cd {shlex.quote(str(program.working_dir))} && {entrypoint}"
    else:
        runtime_env |= {"working_dir": str(program.working_dir), "excludes": [*_NEVER_UPLOADED, *args.exclude]}
        run_dir = program.config.settings.reporting.run_dir
        if not (program.is_script or (run_dir and Path(run_dir).is_absolute())):
            say(
                "warning: reporting.run_dir is not an absolute path; what the run writes stays in a temporary folder "
                "of the cluster"
            )
    # Ray is imported only now: mistakes answer at once.
    from rlhf_ray.launchers.ray_job import RayJob

    address = args.address or os.environ.get("RAY_ADDRESS") or _DEFAULT_ADDRESS
    job = RayJob.submit(address, entrypoint=entrypoint, runtime_env=runtime_env)
    say(f"submitted {job.job_id}\n{job.how_to_look()}")
    return 0 if args.no_wait else job.follow(sys.stdout, stop_timeout_s=_STOP_WAIT_S + _LAST_LOOK_S)


if __name__ == "__main__":
    sys.exit(main("ray", add_ray))
