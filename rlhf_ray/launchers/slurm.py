"""Launch under Slurm: write a job that brings its own Ray, and submit it."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.command import Commands
from rlhf_ray.errors import ConfigError
from rlhf_ray.launchers.program import REPEATED, Program, add_backend, main

__all__ = ["SlurmJob", "add_slurm"]

_PLAIN = re.compile(r"[\w@%+=:,./-]+", re.ASCII)

_SAME_FOR_ALL = Path(__file__).with_name("slurm_job.sh")


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmJob:
    """A job's script."""

    name: str
    command: Sequence[str]
    """The program's command line; of a job that is requeued it resumes what an earlier start left."""
    working_dir: Path
    """Absolute; seen by every node."""
    log_dir: Path
    """Absolute; seen by every node."""
    env: Mapping[str, str]
    path: Path | None
    """Folder with ``ray``, put first on PATH."""
    options: argparse.Namespace
    """Those of ``rlhf-ray launch slurm``, as they were given."""

    def script(self) -> str:
        """Write the script.

        Raises:
            ConfigError: A value cannot be in an ``#SBATCH`` line.
        """
        directives = "".join(f"#SBATCH {line}\n" for line in self._directives())
        preparation = "".join(f"{line}\n" for line in self._preparation())
        return f"#!/bin/bash\n{directives}\n{preparation}\n{_SAME_FOR_ALL.read_text(encoding='utf-8')}"

    @property
    def log(self) -> str:
        """Path of the job's log, with Slurm's ``%j`` for the job's number."""
        return f"{str(self.log_dir).replace('%', '%%')}/{self.name}-%j.log"

    def _directives(self) -> Iterator[str]:
        yield _directive("job-name", self.name)
        yield _directive("nodes", self.options.nodes)
        yield _directive("ntasks-per-node", 1)
        if not self.options.share_nodes:
            # symmetric-run refuses a node with another Ray, and in the end stops every Ray of the user.
            yield "--exclusive"
        for option in ("gpus-per-node", "cpus-per-task", "partition", "account", "time"):
            value = getattr(self.options, option.replace("-", "_"))
            if value is not None:
                yield _directive(option, value)
        yield _directive("output", self.log)
        yield _directive("signal", f"B:TERM@{self.options.grace_s}")
        # Without a run to resume, a second start would begin from nothing.
        yield "--requeue" if self.options.requeue else "--no-requeue"
        yield "--open-mode=append"
        for line in self.options.sbatch:
            option = line.removeprefix("#SBATCH").strip()
            if not option or not option.isprintable():
                raise ConfigError("--sbatch", line, "give one option of sbatch, such as constraint=a100")
            yield option if option.startswith("-") else f"--{option}"

    def _preparation(self) -> Iterator[str]:
        gpus = self.options.gpus_per_node
        yield "set -o errexit -o nounset -o pipefail"
        yield f"cd {shlex.quote(str(self.working_dir))}"
        if self.options.setup:
            # Scripts of conda and of environment modules read variables that are not set.
            yield from ("set +o nounset", *self.options.setup, "set -o nounset")
        if self.path is not None:
            yield f"export PATH={shlex.quote(str(self.path))}:$PATH"
        for name, value in self.env.items():
            yield f"export {name}={shlex.quote(value)}"
        yield f"command=({shlex.join(self.command)})"
        yield f"srun_options=({shlex.join(self._srun_options())})"
        yield f"ray_options=({'' if gpus is None else f'--num-gpus {gpus}'})"
        yield f"log_dir={shlex.quote(str(self.log_dir))}"
        yield f"requeue={'yes' if self.options.requeue else ''}"

    def _srun_options(self) -> list[str]:
        if self.options.container_image is None:
            return []
        folders = dict.fromkeys((str(self.working_dir), str(self.log_dir)))
        mounts = ",".join([*(f"{folder}:{folder}" for folder in folders), *self.options.container_mounts])
        return [
            f"--container-image={self.options.container_image}",
            f"--container-mounts={mounts}",
            f"--container-workdir={self.working_dir}",
        ]


def _directive(option: str, value: object) -> str:
    r"""Write an option of sbatch.

    Its quoting is not the shell's: a space counts even behind a backslash, and a backslash even within quotes of
    either kind.
    """
    text = str(value)
    if "\\" in text or not text.isprintable():
        raise ConfigError(f"--{option}", value, "Slurm takes no backslash, tab or line break here")
    if _PLAIN.fullmatch(text):
        return f"--{option}={text}"
    escaped = text.replace('"', r"\"")
    return f'--{option}="{escaped}"'


_SUBMIT_TIMEOUT_S = 60.0

_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII)

# minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]
_TIME_LIMIT = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|infinite|unlimited", re.IGNORECASE)

_PLAIN_YAML = re.compile(r"/[\w./+@-]*")


def add_slurm(backends: Commands) -> None:
    """Add ``rlhf-ray launch slurm``."""
    summary = "submit a Slurm job that starts Ray on its nodes, runs there, and can be requeued and resumed"
    add = add_backend(backends, "slurm", _run, summary).add_argument
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
        metavar="OPTION",
        help="further #SBATCH line, such as mem=0 or constraint=a100; as often as needed",
        **REPEATED,
    )
    add(
        "--requeue",
        action="store_true",
        help="queue again after preemption, a lost node or the time limit, and resume from the newest checkpoint in "
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
        metavar="SRC:DST",
        help="mounts in addition to the working directory and the log folder; as often as needed",
        **REPEATED,
    )
    add(
        "--setup",
        metavar="COMMAND",
        help="shell command before the start, such as 'module load cuda'; as often as needed",
        **REPEATED,
    )
    add("--python", metavar="PATH", help="interpreter (default: this one; in a container: python)")
    add("--working-dir", metavar="DIR", help="folder to run in, seen by all nodes (default: this one)")
    add(
        "--log-dir",
        metavar="DIR",
        default="logs",
        help="folder of script and log (default: %(default)s in the working directory)",
    )
    add("--no-check", action="store_true", help="skip the check of the settings here: their files are on the cluster")
    add("--dry-run", action="store_true", help="print the script and submit nothing")


def _run(args: argparse.Namespace) -> int:
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
    path.touch(mode=0o600)  # What --env sets may be a secret.
    path.write_text(text, encoding="utf-8")
    job_id = _submit(path, job.working_dir)
    log = job.log.replace("%%", "%").replace("%j", job_id)
    sys.stdout.write(f"submitted job {job_id}\n  squeue --jobs {job_id}\n  tail -F {log}\n  scancel {job_id}\n")
    return 0


def _job(args: argparse.Namespace) -> SlurmJob:
    program = Program.of(args)
    if args.time is not None and not _TIME_LIMIT.fullmatch(args.time):
        raise ConfigError("--time", args.time, "write minutes, hours:minutes:seconds or days-hours")
    name = args.job_name or re.sub(r"[^\w.-]+", "-", program.path.stem, flags=re.ASCII).lstrip("-.") or "rlhf-ray"
    if not _NAME.fullmatch(name):
        raise ConfigError("--job-name", name, "use letters, digits, dots, dashes and underscores")
    ray_address = program.config.settings.resources.ray_address
    if ray_address not in (None, "auto"):
        raise ConfigError("resources.ray_address", ray_address, "leave it out: a job has its own Ray")
    if args.requeue:
        program = _resuming(program, program.working_dir / "runs" / name)
    in_container = args.container_image is not None
    python = args.python or ("python" if in_container else sys.executable)
    return SlurmJob(
        name=name,
        command=program.command(python),
        working_dir=program.working_dir,
        log_dir=program.working_dir / Path(args.log_dir).expanduser(),
        env=program.variables,
        path=Path(python).parent if os.path.isabs(python) and not in_container else None,
        options=args,
    )


def _resuming(program: Program, usual: Path) -> Program:
    """Let every start of the job resume one run.

    Args:
        program: What is started.
        usual: Run directory where the settings name none.

    Raises:
        ConfigError: The settings write no checkpoints, or the run directory holds a run with other settings.
    """
    reporting, checkpointing = program.config.settings.reporting, program.config.settings.checkpointing
    if program.shows_settings and checkpointing.interval == 0:
        remedy = "a requeued job resumes from its newest checkpoint; give, for example, checkpointing.interval=20"
        raise ConfigError("checkpointing.interval", 0, remedy)
    if reporting.run_dir is None:
        # As YAML, which overrides are read as.
        path = str(usual) if _PLAIN_YAML.fullmatch(str(usual)) else json.dumps(str(usual))
        program = program.with_override(f"reporting.run_dir={path}")
    if checkpointing.resume != "never":
        return program
    if program.shows_settings:
        _check_run(program, program.working_dir / Path(reporting.run_dir or usual).expanduser())
    return program.with_override("checkpointing.resume=same")


def _check_run(program: Program, run_dir: Path) -> None:
    """Find settings that the run in a directory was not begun with: the job would end as soon as it starts."""
    from rlhf_ray.algorithm.resuming import check_same, resolved_yaml
    from rlhf_ray.reporting.run_directory import RunDirectory

    directory = RunDirectory(run_dir)
    if directory.config.exists() and RunDirectory.holds_a_run(str(run_dir)):
        check_same(directory, resolved_yaml(program.config), algorithm_name=program.config.algorithm_name)


def _submit(script: Path, working_dir: Path) -> str:
    command = ["sbatch", "--parsable", str(script)]
    try:
        done = subprocess.run(command, cwd=working_dir, capture_output=True, text=True, timeout=_SUBMIT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise ConfigError("launch slurm", "sbatch", f"no answer within {_SUBMIT_TIMEOUT_S:g} s; try `sinfo`") from None
    if done.returncode != 0:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise ConfigError("launch slurm", str(script), f"Slurm refused the job: {said}")
    # With several clusters: number;cluster.
    return done.stdout.strip().partition(";")[0]


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main("slurm", add_slurm))
