"""Run a training as a job on a Ray cluster with Ray's own client: submit, inspect, stop and resume.

::

    python examples/submit_job.py submit --run-dir /shared/runs/first                          # the quickstart
    python examples/submit_job.py submit --run-dir /shared/runs/gsm8k examples/gsm8k_ppo.yaml training.lr=2e-6
    python examples/submit_job.py status JOB
    python examples/submit_job.py logs JOB
    python examples/submit_job.py stop JOB

The cluster is given by ``--address`` (its dashboard) or RAY_ADDRESS. ``submit`` follows the log until the job ends;
Ctrl-C stops the job. The run directory must be accessible from every node of the cluster. Submitting a job with the
same run directory again resumes the run from its newest checkpoint.

``rlhf-ray launch ray`` does this and more. Write a script like this one to submit jobs from your own tools.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray.job_submission import JobStatus, JobSubmissionClient

from rlhf_ray import AlgorithmConfig, PPOConfig

# By default, Ray sends SIGKILL 3 s after SIGTERM; stopping engines and finishing a checkpoint takes longer.
STOP_WAIT_S = 90
POLL_INTERVAL_S = 0.5
# Used if the settings configure no checkpoints, since a run could then not be resumed.
CHECKPOINT_INTERVAL = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the four commands; the exit code is 0 unless a job failed or was stopped."""
    args = parse(argv)
    client = JobSubmissionClient(args.address)
    if args.command == "submit":
        return submit(client, args)
    if args.command == "status":
        print(status_line(client, args.job))
    elif args.command == "logs":
        sys.stdout.write(client.get_job_logs(args.job))
    else:
        stop(client, args.job)
    return 0


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Run trainings as jobs on a Ray cluster.")
    default = os.environ.get("RAY_ADDRESS", "http://127.0.0.1:8265")
    parser.add_argument("--address", metavar="URL", default=default, help="job server (default: %(default)s)")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    new = commands.add_parser("submit", help="submit or resume a training, and follow its log")
    new.add_argument("--run-dir", metavar="DIR", type=Path, required=True, help="absolute; accessible from every node")
    new.add_argument("--no-wait", action="store_true", help="do not follow the log")
    new.add_argument("settings", nargs="*", metavar="CONF.yaml | section.name=value", help="default: the quickstart")
    for name, summary in (("status", "show a job's state"), ("logs", "show its log"), ("stop", "stop it cleanly")):
        commands.add_parser(name, help=summary).add_argument("job", metavar="JOB", help="as submit printed it")
    args = parser.parse_args(argv)
    if args.command == "submit" and not args.run_dir.is_absolute():
        parser.error(f"--run-dir {args.run_dir}: a job runs in a temporary folder; give an absolute path")
    return args


def submit(client: JobSubmissionClient, args: argparse.Namespace) -> int:
    """Submit the job and follow it."""
    conf, overrides = conf_and_overrides(args.settings)
    entrypoint = (
        f"exec {shlex.join(training(conf, overrides, args.run_dir))}"  # exec: no shell between Ray and the run.
    )
    job = client.submit_job(
        entrypoint=entrypoint, runtime_env=runtime_env(conf), metadata={"run_dir": str(args.run_dir)}
    )
    print(f"submitted {job}: {entrypoint}", flush=True)
    if args.no_wait:
        return 0
    try:
        asyncio.run(copy_log(client, job))
    except KeyboardInterrupt:
        stop(client, job)
    print(status_line(client, job))
    return 0 if client.get_job_status(job) == JobStatus.SUCCEEDED else 1


def conf_and_overrides(settings: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Separate the configuration file, if there is one, from the overrides."""
    if settings and "=" not in settings[0]:
        return Path(settings[0]).absolute(), list(settings[1:])
    return None, list(settings)


def training(conf: Path | None, overrides: Sequence[str], run_dir: Path) -> list[str]:
    """Return the command of a run that can be resumed; a wrong setting is an error here, not in the job's log."""
    config = PPOConfig() if conf is None else AlgorithmConfig.from_yaml(conf)
    settings = config.apply_overrides(overrides).validate().settings
    checkpoints = [] if settings.checkpointing.interval else [f"checkpointing.interval={CHECKPOINT_INTERVAL}"]
    file = [] if conf is None else [f"./{conf.name}"]
    resume = [f"reporting.run_dir={run_dir}", "checkpointing.resume=same"]
    return ["rlhf-ray", "train", *file, *overrides, *checkpoints, *resume]


def runtime_env(conf: Path | None) -> dict[str, Any]:
    """Upload the file's folder, which may contain reward functions, and give the job time to stop."""
    variables = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}}
    return variables if conf is None else {**variables, "working_dir": str(conf.parent)}


async def copy_log(client: JobSubmissionClient, job: str) -> None:
    """Print the log until the job ends."""
    async for text in client.tail_job_logs(job):
        print(text, end="", flush=True)


def stop(client: JobSubmissionClient, job: str) -> None:
    """Send SIGTERM and wait until the run has stopped its engines and learners."""
    client.stop_job(job)
    while not client.get_job_status(job).is_terminal():
        time.sleep(POLL_INTERVAL_S)


def status_line(client: JobSubmissionClient, job: str) -> str:
    """Describe a job in one line."""
    details = client.get_job_info(job)
    lines = (details.message or "").strip().splitlines()
    return f"{job} {details.status.value}: {lines[0] if lines else 'no message'}"


if __name__ == "__main__":
    sys.exit(main())
