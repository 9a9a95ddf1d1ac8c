"""Launch here: become the script or ``rlhf-ray train``, in the Ray of this machine if one is running."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from pathlib import Path

from rlhf_ray.command import Commands, say
from rlhf_ray.errors import ConfigError
from rlhf_ray.launchers.program import Program, add_backend, main

__all__ = ["add_local"]

_PROBE_TIMEOUT_S = 5.0


def add_local(backends: Commands) -> None:
    """Add ``rlhf-ray launch local``."""
    summary = "run on this machine, in a Ray that `ray start` left running or in one that ends with the run"
    add_backend(backends, "local", _run, summary).add_argument(
        "--address",
        metavar="HOST:PORT",
        help="Ray to join; `local` starts a new one (default: RAY_ADDRESS, else the last `ray start` here, else new)",
    )


def _run(args: argparse.Namespace) -> int:
    """Replace this process by the run: signals and the exit code are then the run's own, with nothing in between."""
    program = Program.of(args)
    variables = {**os.environ, **program.variables}
    address = args.address or variables.get("RAY_ADDRESS")
    if address is None and (found := _running_ray(variables)) is not None:
        say(f"joining the Ray at {found}")
        # Not its address: Ray shows the token of the home folder only to a Ray that it found by itself.
        address = "auto"
    if address is not None:
        variables["RAY_ADDRESS"] = address
    command = program.command(sys.executable)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], command, variables)


def _running_ray(variables: dict[str, str]) -> str | None:
    """Read the address that `ray start` leaves where `ray.init()` looks for it.

    Raises:
        ConfigError: Nothing answers there: that Ray has ended without `ray stop`, and `ray.init()` would fail late.
    """
    temporary = variables.get("RAY_TMPDIR") or variables.get("TMPDIR") or "/tmp"
    record = Path(temporary) / "ray" / "ray_current_cluster"
    try:
        address = record.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_TIMEOUT_S).close()
    except (OSError, ValueError):
        remedy = f"this Ray, on record in {record}, does not answer; delete that file, or give --address local"
        raise ConfigError("--address", address, remedy) from None
    return address


if __name__ == "__main__":
    sys.exit(main("local", add_local))
