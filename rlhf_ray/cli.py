"""Around the loop: the ``rlhf-ray`` command. It builds a configuration, drives ``Algorithm`` and shows what came out.

Heavy modules are imported by the command that needs them, so that ``--help`` and mistakes answer at once.

Exit codes: 0 done; 1 the run failed; 2 wrong command line, settings or data; 130 Ctrl-C; 143 SIGTERM.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rlhf_ray.config.held_out_sets import held_out_sets
from rlhf_ray.errors import ConfigError, DataError, RLHFRayError
from rlhf_ray.evaluation.command_line import eval_path, measured_model
from rlhf_ray.launchers.command import add_launch_command

if TYPE_CHECKING:
    from rich.console import Console

    from rlhf_ray.algorithm.algorithm import Algorithm
    from rlhf_ray.config.builder import AlgorithmConfig
    from rlhf_ray.reporting.summary import RunSummary

__all__ = ["load_config", "main"]

_FAILED, _WRONG_INPUT, _INTERRUPTED, _TERMINATED = 1, 2, 130, 143
_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)*=")
_ALGORITHM = "algorithm="
_QUICKSTART_EVALUATION_INTERVAL = 10

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

# Set when SIGTERM arrived: how ``ray job stop``, Kubernetes and Slurm end a process.
_sigterm = threading.Event()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments after the program's name; none: those of this process.

    Returns:
        The exit code (see the module's docstring).
    """
    args = _parse(argv)
    # A reward named `module:function` is looked up where the user stands, as `python script.py` would find it.
    sys.path.insert(0, os.getcwd())
    try:
        with _sigterm_raises():
            code: int = args.run(args)
            return code
    except RLHFRayError as error:
        _say(f"error: {error}")
        return _WRONG_INPUT if isinstance(error, (ConfigError, DataError)) else _FAILED
    except KeyboardInterrupt:
        return _TERMINATED if _sigterm.is_set() else _INTERRUPTED
    except SystemExit:
        # Until the algorithm is built, ray.init's own SIGTERM handler is in place, which ends by SystemExit.
        return _TERMINATED
    except Exception:
        # The end of an error that nobody expected: the user gets its traceback and the shell a failure.
        traceback.print_exc()
        return _FAILED


def load_config(path: str | None, overrides: Sequence[str]) -> AlgorithmConfig:
    """Read a configuration.

    Args:
        path: YAML file; none: the defaults, which are the quickstart task.
        overrides: ``section.field=value``, applied in order, and ``algorithm=NAME`` in place of the file's.

    Raises:
        ConfigError: There is no such file, or a setting in it or in ``overrides`` is wrong.
    """
    from rlhf_ray.config.builder import AlgorithmConfig
    from rlhf_ray.config.yaml_text import parsed_override

    named = [parsed_override(override)[1] for override in overrides if override.startswith(_ALGORITHM)]
    config = AlgorithmConfig.from_yaml("{}\n" if path is None else Path(path), algorithm=named[-1] if named else None)
    return config.apply_overrides(overrides)


# --- the command line ---


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    args, late = parser.parse_known_args(argv)
    if unknown := [text for text in late if text.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    # argparse fills a "*" positional once: what follows an option comes back as unknown.
    if "run_dirs" in args:
        args.run_dirs += late
    else:
        _split_settings(parser, args, [*args.settings, *late])
    return args


def _split_settings(parser: argparse.ArgumentParser, args: argparse.Namespace, given: list[str]) -> None:
    args.conf = given.pop(0) if args.takes_file and given and not _is_override(given[0]) else None
    if wrong := [text for text in given if not _is_override(text)]:
        parser.error(f"{wrong[0]!r} is not an override; write section.field=value, for example training.lr=2e-6")
    args.overrides = given


def _is_override(text: str) -> bool:
    """Tell ``training.lr=1`` from ``runs/lr=1/conf.yaml``: before the = of an override are names and dots alone."""
    return _OVERRIDE.match(text) is not None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlhf-ray",
        description="Reinforcement learning for language models on Ray.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = _command(commands, "train", _train, "train a model")
    place = train.add_mutually_exclusive_group()
    place.add_argument("--run-dir", metavar="DIR", help="folder of the run (reporting.run_dir)")
    place.add_argument(
        "--resume",
        metavar="DIR",
        help="go on with the run in this folder from its newest checkpoint, with its settings",
    )
    evaluate = _command(
        commands,
        "evaluate",
        _evaluate,
        "measure a model on held-out prompts; keeps no files",
        file="CHECKPOINT | CONF.yaml",
        wanted="a checkpoint, a run's folder (for its newest one) or a model's folder, with the settings of its run; "
        "or a YAML file; then settings that replace these",
    )
    evaluate.add_argument("--checkpoint", metavar="PATH", help="the same checkpoint, where CONF.yaml is given too")
    evaluate.add_argument(
        "--data",
        action="append",
        metavar="[NAME=]DATASET",
        help="held-out set instead of data.eval_path, and what its metrics are called; may be given several times",
    )
    _command(commands, "config", _config, "print the resolved settings as YAML, and the schedule they lead to")
    _command(commands, "quickstart", _quickstart, "train the built-in model on the built-in task", takes_file=False)
    doctor = _command(commands, "doctor", _doctor, "check this machine and the settings before a run")
    doctor.add_argument("--skip-engine", action="store_true", help="do not start a vLLM engine (about half a minute)")
    _report_command(commands)
    add_launch_command(commands)
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    *,
    takes_file: bool = True,
    file: str = "CONF.yaml",
    wanted: str = "a YAML file, then settings that replace the file's",
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.", allow_abbrev=False)
    metavar = f"{file} | section.field=value" if takes_file else "section.field=value"
    wanted = wanted if takes_file else "settings that replace defaults"
    command.add_argument("settings", nargs="*", metavar=metavar, help=wanted)
    command.set_defaults(run=run, takes_file=takes_file)
    return command


def _report_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    summary = "write a page about one or several runs: curves, settings, completions"
    report = commands.add_parser("report", help=summary, description=f"{summary.capitalize()}.", allow_abbrev=False)
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
    report.set_defaults(run=_report)


# --- the commands ---


def _train(args: argparse.Namespace) -> int:
    if args.resume is not None:
        config = _with_display(_resumed(args.resume, args.conf, args.overrides))
    else:
        config = _with_display(load_config(args.conf, args.overrides))
    if args.run_dir is not None:
        config.reporting(run_dir=args.run_dir)
    with _running(config.build_algo) as algo:
        run = _train_to_the_end(algo)
    from rlhf_ray.reporting.summary import show_summary

    show_summary(_stdout(), run)
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    measured = measured_model(args.conf, args.checkpoint)
    algorithm = [override for override in args.overrides if override.startswith(_ALGORITHM)]
    config = _with_display(load_config(measured.conf, algorithm))
    if measured.model_path is not None:
        config.model(path=measured.model_path)
    config.apply_overrides(args.overrides)
    if args.data is not None:
        config.data(eval_path=eval_path(args.data))
    if not held_out_sets(config.settings.data):
        raise ConfigError("data.eval_path", None, "there is nothing to measure on: name a held-out set, --data FILE")
    # The best checkpoint of a run may be that on a set which is not measured here.
    config.checkpointing(best_metric=None, interval=0, path=None)
    # What cannot be deleted must not take the place of the error that ended the run.
    with tempfile.TemporaryDirectory(prefix="rlhf-ray-", ignore_cleanup_errors=True) as folder:
        run_dir = str(Path(folder) / "run")
        config.reporting(run_dir=run_dir, tensorboard=False, wandb_project=None, mlflow_experiment=None)
        config.reporting(completions_interval=0, timeline_interval=0)
        with _running(lambda: _build(config, measured.checkpoint), keeps_files=False) as algo:
            metrics = algo.evaluate()
    from rlhf_ray.reporting.summary import show_evaluation

    show_evaluation(_stdout(), metrics)
    return 0


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
    sys.stdout.write(f"{yaml_text(values)}\n{shown}{_comments('What follows from these settings:', schedule)}\n")
    return 0


def _comments(title: str, rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join([f"# {title}", *(f"#   {name:<{width}}  {value}" for name, value in rows)])


def _quickstart(args: argparse.Namespace) -> int:
    config = load_config(None, [f"evaluation.interval={_QUICKSTART_EVALUATION_INTERVAL}", *args.overrides])
    from rlhf_ray.reporting.summary import show_accuracy, show_quickstart

    with _running(_with_display(config).build_algo) as algo:
        before = algo.evaluate()
        show_accuracy(_stdout(), "before training", before)
        run = _train_to_the_end(algo)
        after = algo.evaluate()
    show_quickstart(_stdout(), before, after, run)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    config = load_config(args.conf, args.overrides).validate()
    from rlhf_ray.doctor.examination import examine

    return examine(config.settings, console=_stdout(), skip_engine=args.skip_engine)


def _report(args: argparse.Namespace) -> int:
    from rlhf_ray.reporting.report import DEFAULT_TABLES, write_report

    count = DEFAULT_TABLES if args.completions is None else args.completions
    path = write_report(args.run_dirs, output=args.output, completions=count)
    sys.stdout.write(f"{path}\n")
    return 0


def _resumed(run_dir: str, conf: str | None, overrides: Sequence[str]) -> AlgorithmConfig:
    """Settings that go on with a run: its own, changed by overrides; a file that is named must say the same."""
    from rlhf_ray.reporting.run_directory import RunDirectory

    directory = RunDirectory.at(run_dir)
    if not directory.config.is_file():
        raise ConfigError("--resume", run_dir, f"this folder holds no run: there is no {directory.config.name} in it")
    config = load_config(str(directory.config) if conf is None else conf, overrides)
    return config.reporting(run_dir=run_dir).checkpointing(resume="any" if conf is None else "same")


def _build(config: AlgorithmConfig, checkpoint: str | None) -> Algorithm:
    if checkpoint is None:
        return config.build_algo()
    return config.algorithm_class.from_checkpoint(checkpoint, config=config)


def _with_display(config: AlgorithmConfig) -> AlgorithmConfig:
    """Show lines where a panel cannot be drawn; a script may stay silent there, a command may not."""
    if config.settings.reporting.progress == "auto" and not _stdout().is_terminal:
        config.reporting(progress="plain")
    return config


# --- a run ---


@contextmanager
def _running(build: Callable[[], Algorithm], *, keeps_files: bool = True) -> Iterator[Algorithm]:
    """Build an algorithm and stop it in the end, however the end comes."""
    algo = build()
    try:
        _install_sigterm()  # Again: ray.init puts its own in place, which ends Ray's processes before ours could stop.
        yield algo
    except KeyboardInterrupt:
        _say(f"stopping; what the run wrote is in {algo.run_dir}" if keeps_files else "stopping")
        raise
    finally:
        algo.stop()


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


def _install_sigterm() -> None:
    def raise_terminated(signum: int, frame: object) -> NoReturn:
        # Schedulers repeat themselves; the second one must not cut the clean stop short.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _sigterm.set()
        raise KeyboardInterrupt  # The one exception that may leave a wait inside Ray; _sigterm tells it from Ctrl-C.

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, raise_terminated)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    previous = signal.getsignal(signal.SIGTERM)
    _sigterm.clear()
    _install_sigterm()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, previous)


# --- output ---


def _stdout() -> Console:
    # The global console is the live panel's too: what is printed through it appears above the panel.
    import rich

    return rich.get_console()


def _say(text: str) -> None:
    # sys.stderr itself, not a console on it: while the live panel is up it stands for a place above the panel.
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main())
