"""The text of a Slurm job: ``ray symmetric-run`` on every node, the program on the first, a requeue where asked."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.errors import ConfigError

__all__ = ["SlurmJob"]

_PLAIN = re.compile(r"[\w@%+=:,./-]+", re.ASCII)

_NETWORK = """\
# The batch script runs on the first node, which becomes Ray's head.
head_ip=127.0.0.1
if ((SLURM_JOB_NUM_NODES > 1)); then
    head_ip=$(getent ahostsv4 "$SLURMD_NODENAME" | awk 'NR == 1 { print $1 }' || true)
    # Some distributions map a machine's own name to a loopback address.
    if [[ -z $head_ip || $head_ip == 127.* ]]; then
        head_ip=$(hostname -I | awk '{ print $1 }')
    fi
fi
export RAY_ADDRESS=$head_ip:$((20000 + SLURM_JOB_ID % 10000))
# Anybody on these machines can reach Ray's ports: what counts is to know this job's token. Ray's own rule, a token
# where the home folder holds one, is not that of its clients, which would be turned away.
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
if [[ $RAY_AUTH_MODE == token ]]; then
    RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')}
    export RAY_AUTH_TOKEN
fi
# Nodes of a large job come up minutes apart.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=${RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT:-300}
export PYTHONUNBUFFERED=1
cpus=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}
"""

# Only processes with another count than this start's are of an earlier one.
_LEFTOVERS = """\
# Where Slurm does not track processes by cgroups, the Ray of a start that was killed lives on, and no other one starts
# beside it.
if ((${SLURM_RESTART_COUNT:-0} > 0)); then
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 bash -c '
        for process in /proc/[0-9]*; do
            if grep -zqx "SLURM_JOB_ID=$SLURM_JOB_ID" "$process/environ" &&
                ! grep -zqx "SLURM_RESTART_COUNT=$SLURM_RESTART_COUNT" "$process/environ"; then
                kill -KILL "${process#/proc/}"
            fi
        done 2> /dev/null
        true'
fi
"""

_RUN = """\
# Slurm's TERM would take Ray away from under the program; this one reaches the program alone.
stopping=
stop() {
    stopping=yes
    if [[ -s $pid_file ]]; then
        kill -TERM "$(< "$pid_file")" || true
    else
        kill -TERM "$step" || true
    fi
}
rm -f "$pid_file"
trap 'rm -f "$pid_file"' EXIT

srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="$cpus" \\
    --kill-on-bad-exit=1 "${srun_options[@]}" \\
    ray symmetric-run --address "$RAY_ADDRESS" --min-nodes "$SLURM_JOB_NUM_NODES" \\
    --num-cpus "$cpus" "${ray_options[@]}" \\
    -- bash -c 'echo $$ > "$0" && exec "$@"' "$pid_file" "${command[@]}" &
step=$!
trap stop TERM
# A signal ends wait before the step has ended.
while true; do
    status=0
    wait "$step" || status=$?
    kill -0 "$step" 2> /dev/null || break
done
if ((status == 0)) && [[ ! -e $pid_file ]]; then
    echo "Ray did not start: the program has not run" >&2
    status=1
fi
"""

# A job that is being cancelled gets TERM too; it is no longer RUNNING then.
_REQUEUE = """\
if [[ -n $stopping ]] && ((status != 0)) &&
    [[ $(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T) == RUNNING ]]; then
    echo "asked to stop before the end: queueing again to go on from the last checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
fi
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmJob:
    """Everything that the job's script says."""

    name: str
    command: tuple[str, ...]
    """The program's command line; of a job that is requeued it goes on with what an earlier start left."""
    working_dir: Path
    """Absolute; seen by every node."""
    log_dir: Path
    """Absolute; seen by every node."""
    nodes: int
    grace_s: int
    """Time between the request to stop and the time limit."""
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    partition: str | None = None
    account: str | None = None
    time_limit: str | None = None
    share_nodes: bool = False
    extra: tuple[str, ...] = ()
    """Further options of sbatch, ``name=value`` with or without dashes."""
    container_image: str | None = None
    container_mounts: tuple[str, ...] = ()
    """Beside the working directory and the log folder."""
    env: Mapping[str, str]
    path: Path | None = None
    """Folder with ``ray``, put first on PATH."""
    setup: tuple[str, ...] = ()
    """Shell commands before everything else."""
    requeue: bool = False
    """Whether Slurm may start the job again."""

    def script(self) -> str:
        """Write the script.

        Raises:
            ConfigError: A value cannot stand in an ``#SBATCH`` line.
        """
        parts = [
            "#!/bin/bash\n" + "".join(f"#SBATCH {line}\n" for line in self._directives()),
            "set -o errexit -o nounset -o pipefail\n",
            "".join(f"{line}\n" for line in self._preparation()),
            _NETWORK,
            "".join(f"{line}\n" for line in self._words()),
            *([_LEFTOVERS] if self.requeue else []),
            _RUN,
            (_REQUEUE if self.requeue else "") + 'exit "$status"\n',
        ]
        return "\n".join(parts)

    @property
    def log(self) -> str:
        """Path of the job's log, with Slurm's ``%j`` for the job's number."""
        return f"{str(self.log_dir).replace('%', '%%')}/{self.name}-%j.log"

    def _directives(self) -> Iterator[str]:
        yield _directive("job-name", self.name)
        yield _directive("nodes", str(self.nodes))
        yield _directive("ntasks-per-node", "1")
        if not self.share_nodes:
            # symmetric-run refuses a node with another Ray, and in the end stops every Ray of the user.
            yield "--exclusive"
        for option, value in (
            ("gpus-per-node", self.gpus_per_node),
            ("cpus-per-task", self.cpus_per_task),
            ("partition", self.partition),
            ("account", self.account),
            ("time", self.time_limit),
        ):
            if value is not None:
                yield _directive(option, str(value))
        yield _directive("output", self.log)
        yield _directive("signal", f"B:TERM@{self.grace_s}")
        # Without a run to go on with, a second start would begin from nothing.
        yield "--requeue" if self.requeue else "--no-requeue"
        yield "--open-mode=append"
        for line in self.extra:
            yield _extra(line)

    def _preparation(self) -> Iterator[str]:
        yield f"cd {shlex.quote(str(self.working_dir))}"
        if self.setup:
            # Scripts of conda and of environment modules read variables that are not set.
            yield from ("set +o nounset", *self.setup, "set -o nounset")
        if self.path is not None:
            yield f"export PATH={shlex.quote(str(self.path))}:$PATH"
        for name, value in self.env.items():
            yield f"export {name}={shlex.quote(value)}"

    def _words(self) -> Iterator[str]:
        yield _array("command", self.command)
        yield _array("srun_options", self._srun_options())
        yield _array("ray_options", [] if self.gpus_per_node is None else ["--num-gpus", str(self.gpus_per_node)])
        yield f"pid_file={shlex.quote(str(self.log_dir))}/.$SLURM_JOB_ID.pid"

    def _srun_options(self) -> list[str]:
        if self.container_image is None:
            return []
        folders = dict.fromkeys((str(self.working_dir), str(self.log_dir)))
        mounts = ",".join([*(f"{folder}:{folder}" for folder in folders), *self.container_mounts])
        return [
            f"--container-image={self.container_image}",
            f"--container-mounts={mounts}",
            f"--container-workdir={self.working_dir}",
        ]


def _array(name: str, words: list[str] | tuple[str, ...]) -> str:
    return f"{name}=({shlex.join(words)})"


def _directive(option: str, value: str) -> str:
    r"""Write an option of sbatch.

    Its quoting is not the shell's: a space counts even behind a backslash, and a backslash even within quotes of
    either kind.
    """
    if "\\" in value or not value.isprintable():
        raise ConfigError(f"--{option}", value, "Slurm takes no backslash, tab or line break here")
    if _PLAIN.fullmatch(value):
        return f"--{option}={value}"
    escaped = value.replace('"', r"\"")
    return f'--{option}="{escaped}"'


def _extra(line: str) -> str:
    option = line.removeprefix("#SBATCH").strip()
    if not option or not option.isprintable():
        raise ConfigError("--sbatch", line, "give one option of sbatch, such as constraint=a100")
    return option if option.startswith("-") else f"--{option}"
