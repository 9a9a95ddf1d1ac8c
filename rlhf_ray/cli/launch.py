"""The ``rlhf-ray launch`` command: one sub-command per backend."""

from __future__ import annotations

import argparse

from rlhf_ray.command import Commands
from rlhf_ray.launchers.local import add_local
from rlhf_ray.launchers.ray import add_ray
from rlhf_ray.launchers.slurm import add_slurm

__all__ = ["add_launch_command"]

_EXAMPLES = """\
examples:
  rlhf-ray launch local conf.yaml training.lr=2e-6
  rlhf-ray launch ray conf.yaml --address http://head:8265 reporting.run_dir=/shared/runs/first
  rlhf-ray launch slurm conf.yaml --nodes 2 --gpus-per-node 8 --time 12:00:00 --requeue
  rlhf-ray launch slurm train.py --config conf.yaml --gpus-per-node 8 --dry-run
"""


def add_launch_command(commands: Commands) -> None:
    """Add ``launch`` and its backends."""
    launch = commands.add_parser(
        "launch",
        help="run a script or a configuration here, on a Ray cluster or under Slurm",
        description="Run a script or a configuration somewhere. Each backend has its own options and --help.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    backends = launch.add_subparsers(required=True, metavar="BACKEND")
    for add_backend in (add_local, add_ray, add_slurm):
        add_backend(backends)
