"""``rlhf-ray train`` and ``rlhf-ray quickstart``: from a configuration to a trained model."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_ray.command import Commands, add_command, add_settings, install_sigterm, is_algorithm, load_config, say
from rlhf_ray.errors import ConfigError

if TYPE_CHECKING:
    from rlhf_ray.algorithm.algorithm import Algorithm
    from rlhf_ray.config.builder import AlgorithmConfig
    from rlhf_ray.reporting.summary import RunSummary

__all__ = ["add_train_commands", "running", "with_display"]

_QUICKSTART_EVALUATION_INTERVAL = 10


def add_train_commands(commands: Commands) -> None:
    """Add ``train`` and ``quickstart``."""
    train = add_command(commands, "train", _train, "train a model")
    add_settings(train)
    place = train.add_mutually_exclusive_group()
    place.add_argument("--run-dir", metavar="DIR", help="folder of the run (reporting.run_dir)")
    place.add_argument(
        "--resume", metavar="DIR", help="resume the run in this folder from its newest checkpoint, with its settings"
    )
    quickstart = add_command(commands, "quickstart", _quickstart, "train the built-in model on the built-in task")
    quickstart.add_argument(
        "--environment", choices=["calculator"], help="the built-in task of several turns, with a calculator"
    )
    add_settings(quickstart, None, "settings that replace defaults")


@contextmanager
def running(build: Callable[[], Algorithm], *, keeps_files: bool = True) -> Iterator[Algorithm]:
    """Build an algorithm and stop it in the end, however the end comes."""
    algo = build()
    try:
        install_sigterm()  # Again: ray.init puts its own in place, which ends Ray's processes before ours could stop.
        yield algo
    except KeyboardInterrupt:
        say(f"stopping; what the run wrote is in {algo.run_dir}" if keeps_files else "stopping")
        raise
    finally:
        algo.stop()


def with_display(config: AlgorithmConfig) -> AlgorithmConfig:
    """Show lines where a panel cannot be drawn; a script may stay silent there, a command may not."""
    import rich

    if config.settings.reporting.progress == "auto" and not rich.get_console().is_terminal:
        config.reporting(progress="plain")
    return config


def _train(args: argparse.Namespace) -> int:
    if args.resume is None:
        config = load_config(args.conf, args.overrides)
    else:
        config = _resumed(args.resume, args.conf, args.overrides)
    if args.run_dir is not None:
        config.reporting(run_dir=args.run_dir)
    with running(with_display(config).build_algo) as algo:
        run = _train_to_the_end(algo)
    import rich

    from rlhf_ray.reporting.summary import show_summary

    show_summary(rich.get_console(), run)
    return 0


def _quickstart(args: argparse.Namespace) -> int:
    from rlhf_ray.quickstart import CALCULATOR

    chosen = load_config(None, [override for override in args.overrides if is_algorithm(override)])
    preset = CALCULATOR if args.environment is not None else {}
    config = type(chosen).from_dict({**preset, "evaluation.interval": _QUICKSTART_EVALUATION_INTERVAL})
    config.apply_overrides(args.overrides)
    import rich

    from rlhf_ray.reporting.summary import show_accuracy, show_quickstart

    with running(with_display(config).build_algo) as algo:
        before = algo.evaluate()
        show_accuracy(rich.get_console(), "before training", before)
        run = _train_to_the_end(algo)
        after = algo.evaluate()
    show_quickstart(rich.get_console(), before, after, run)
    return 0


def _resumed(run_dir: str, conf: str | None, overrides: list[str]) -> AlgorithmConfig:
    """Settings that resume a run: its own, changed by overrides; a file that is named must say the same."""
    from rlhf_ray.reporting.run_directory import RunDirectory

    directory = RunDirectory.at(run_dir)
    if not directory.config.is_file():
        raise ConfigError("--resume", run_dir, f"this folder holds no run: there is no {directory.config.name} in it")
    config = load_config(directory.config if conf is None else conf, overrides)
    return config.reporting(run_dir=run_dir).checkpointing(resume="any" if conf is None else "same")


def _train_to_the_end(algo: Algorithm) -> RunSummary:
    """Run the iterations that are left and export the trained model."""
    from rlhf_ray.reporting.run_directory import RunDirectory
    from rlhf_ray.reporting.summary import RunSummary

    run = RunSummary(run_dir=RunDirectory(Path(algo.run_dir)))
    started = time.monotonic()
    while algo.iteration < algo.settings.training.iterations:
        run.record(algo.train())
    run.elapsed_s = time.monotonic() - started
    algo.export_hf(str(run.run_dir.model))
    return run
