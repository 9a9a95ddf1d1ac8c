"""The text of a Slurm job: options of sbatch and what differs between jobs, then ``slurm_job.sh``."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.errors import ConfigError

__all__ = ["SlurmJob"]

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
