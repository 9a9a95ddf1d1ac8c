"""The ``rlhf-ray launch`` command: one sub-command a backend, with the options that all of them share."""

from __future__ import annotations

import argparse

from rlhf_ray.launchers import local, ray, slurm

__all__ = ["add_launch_command"]

_BACKENDS = {"local": local, "ray": ray, "slurm": slurm}

_EXAMPLES = """\
examples:
  rlhf-ray launch local conf.yaml training.lr=2e-6
  rlhf-ray launch ray conf.yaml --address http://head:8265 reporting.run_dir=/shared/runs/first
  rlhf-ray launch slurm conf.yaml --nodes 2 --gpus-per-node 8 --time 12:00:00 --requeue
  rlhf-ray launch slurm train.py --config conf.yaml --gpus-per-node 8 --dry-run
"""


def add_launch_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``launch`` and its backends.

    Each backend's parser sets ``run`` to its own function, and ``settings`` and ``takes_file`` as the other commands
    do: the first word that is no override is the script or configuration.

    Args:
        commands: Where the commands of ``rlhf-ray`` are added.
    """
    launch = commands.add_parser(
        "launch",
        help="run a script or a configuration here, on a Ray cluster or under Slurm",
        description="Run a script or a configuration somewhere. Each backend has its own options and --help.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    backends = launch.add_subparsers(required=True, metavar="BACKEND")
    for name, backend in _BACKENDS.items():
        # Not capitalize(), which would take the capitals of names away.
        description = f"{backend.SUMMARY[0].upper()}{backend.SUMMARY[1:]}."
        parser = backends.add_parser(name, help=backend.SUMMARY, description=description, allow_abbrev=False)
        _add_shared_options(parser)
        backend.add_options(parser)
        parser.set_defaults(run=backend.run, takes_file=True)


def _add_shared_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="SCRIPT_OR_CONF | section.field=value",
        help="a Python script (.py) or a configuration (.yaml), then overrides: settings for the configuration, "
        "arguments for the script",
    )
    parser.add_argument("--config", metavar="FILE", help="configuration that a script gets as --config FILE")
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="environment variable of the run; as often as needed",
    )
