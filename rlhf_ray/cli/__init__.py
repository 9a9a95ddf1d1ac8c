"""The ``rlhf-ray`` command. It builds a configuration, drives ``Algorithm`` and shows the result.

Heavy modules are imported by the command that needs them, so that ``--help`` and mistakes answer at once.

Exit codes: 0 done; 1 the run failed; 2 wrong command line, settings or data; 130 Ctrl-C; 143 SIGTERM.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rlhf_ray.cli.checks import add_check_commands
from rlhf_ray.cli.evaluate import add_evaluate_command
from rlhf_ray.cli.launch import add_launch_command
from rlhf_ray.cli.train import add_train_commands
from rlhf_ray.command import load_config, run_command

__all__ = ["load_config", "main"]

_EXAMPLES = """\
examples:
  rlhf-ray quickstart
  rlhf-ray config training.lr=1e-6 > conf.yaml
  rlhf-ray doctor conf.yaml
  rlhf-ray train conf.yaml training.lr=2e-6 rollouts.group_size=8
  rlhf-ray train conf.yaml algorithm=GRPO
  rlhf-ray train training.iterations=10 --run-dir runs/first
  rlhf-ray train --resume runs/first
  rlhf-ray evaluate runs/first --data gsm8k/test.jsonl --data hard=hard.jsonl
  rlhf-ray evaluate conf.yaml model.path=runs/first/model evaluation.samples_per_prompt=8 evaluation.temperature=0.6
  rlhf-ray report runs/first runs/second --output report.html
  rlhf-ray launch slurm conf.yaml --nodes 2 --gpus-per-node 8 --requeue
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments after the program's name; ``None``: those of this process.

    Returns:
        The exit code (see the module's docstring).
    """
    parser = argparse.ArgumentParser(
        prog="rlhf-ray",
        description="Reinforcement learning for language models on Ray.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_train_commands(commands)
    add_evaluate_command(commands)
    add_check_commands(commands)
    add_launch_command(commands)
    return run_command(parser, argv)
