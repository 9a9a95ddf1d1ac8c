"""``rlhf-ray config``, ``doctor`` and ``report``: look at settings before a run, and at runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from rlhf_ray.command import Commands, add_command, add_settings, load_config
from rlhf_ray.config.builder import AlgorithmConfig

__all__ = ["add_check_commands"]


def add_check_commands(commands: Commands) -> None:
    """Add ``config``, ``doctor`` and ``report``."""
    summary = "print the resolved settings as YAML, and the schedule they lead to"
    config = add_command(commands, "config", _config, summary)
    add_settings(config)
    config.add_argument(
        "--plan",
        action="store_true",
        help="read model, rewards and data too, and print what a run on this machine would start, without starting it",
    )
    doctor = add_command(commands, "doctor", _doctor, "check this machine and the settings before a run")
    add_settings(doctor)
    doctor.add_argument("--skip-engine", action="store_true", help="do not start a vLLM engine (about half a minute)")
    summary = "write a page about one or several runs: curves, settings, completions"
    report = add_command(commands, "report", _report, summary)
    report.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="folder of a run, finished or not")
    report.add_argument(
        "--output",
        metavar="FILE",
        help="the page; default: report.html in the run's folder, of several runs in this one",
    )
    report.add_argument(
        "--completions",
        metavar="N",
        type=int,
        help="iterations of each run whose completions are shown; default: 6, spread over the run",
    )


def _config(args: argparse.Namespace) -> int:
    from rlhf_ray.config.yaml_text import yaml_text

    config = load_config(args.conf, args.overrides)
    schedule, preset, values = config.schedule().rows(), config.quickstart_values, config.to_dict(plain=True)
    for field in preset:  # Not as values: they would stay when a model is put into the file.
        section, _, name = field.partition(".")
        del values[section][name]
    rows = [(field, json.dumps(value)) for field, value in preset.items()]
    title = "From the quickstart's preset, which ends where model.path or data.path is given:"
    shown = f"{_comments(title, rows)}\n\n" if preset else ""
    # As comments, so that `rlhf-ray config > conf.yaml` is a configuration.
    plan = f"\n{_comments('What a run on this machine starts:', _plan(config))}\n" if args.plan else ""
    sys.stdout.write(f"{yaml_text(values)}\n{shown}{_comments('What follows from these settings:', schedule)}\n{plan}")
    return 0


def _plan(config: AlgorithmConfig) -> Sequence[tuple[str, str]]:
    from rlhf_ray.algorithm.inputs import check_inputs
    from rlhf_ray.algorithm.run_plan import Cluster, Placement, RunPlan

    settings = config.validate().settings
    return RunPlan.of(settings, check_inputs(settings), Placement.of(settings, Cluster.of_machine())).rows()


def _comments(title: str, rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join([f"# {title}", *(f"#   {name:<{width}}  {value}" for name, value in rows)])


def _doctor(args: argparse.Namespace) -> int:
    config = load_config(args.conf, args.overrides).validate()
    import rich

    from rlhf_ray.doctor.examination import examine

    return examine(config.settings, console=rich.get_console(), skip_engine=args.skip_engine)


def _report(args: argparse.Namespace) -> int:
    from rlhf_ray.reporting.report import DEFAULT_TABLES, write_report

    count = DEFAULT_TABLES if args.completions is None else args.completions
    path = write_report(args.run_dirs, output=args.output, completions=count)
    sys.stdout.write(f"{path}\n")
    return 0
