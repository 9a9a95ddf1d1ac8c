"""What all commands share: files and overrides as arguments, exit codes, and a clean stop on signals.

Exit codes: 0 done; 1 the run failed; 2 wrong command line, settings or data; 130 Ctrl-C; 143 SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from rlhf_ray.config.builder import AlgorithmConfig
from rlhf_ray.config.yaml_text import parsed_override
from rlhf_ray.errors import ConfigError, DataError, RLHFRayError

__all__ = [
    "Commands",
    "add_command",
    "add_settings",
    "install_sigterm",
    "is_algorithm",
    "load_config",
    "run_command",
    "say",
]


def load_config(path: str | Path | None, overrides: Sequence[str]) -> AlgorithmConfig:
    """Read a configuration.

    Args:
        path: YAML file; ``None``: the defaults, which are the quickstart task.
        overrides: ``section.field=value``, applied in order, and ``algorithm=NAME`` in place of the file's.

    Raises:
        ConfigError: There is no such file, or a setting in it or in ``overrides`` is wrong.
    """
    named = [parsed_override(override)[1] for override in overrides if is_algorithm(override)]
    config = AlgorithmConfig.from_yaml("{}\n" if path is None else Path(path), algorithm=named[-1] if named else None)
    return config.apply_overrides(overrides)


def is_algorithm(override: str) -> bool:
    """Whether an override names the algorithm rather than a setting."""
    return override.startswith("algorithm=")


Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


_FAILED, _WRONG_INPUT, _INTERRUPTED, _TERMINATED = 1, 2, 130, 143

_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)*=")

# Set when SIGTERM arrived: how ``ray job stop``, Kubernetes and Slurm end a process.
_sigterm = threading.Event()


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int], summary: str
) -> argparse.ArgumentParser:
    """Add a command.

    Args:
        commands: Where to add it.
        name: What it is called.
        run: Runs it; returns the exit code.
        summary: What it does, without a capital and a period.
    """
    # Not capitalize(), which would make the other letters small.
    description = f"{summary[0].upper()}{summary[1:]}."
    command = commands.add_parser(name, help=summary, description=description, allow_abbrev=False)
    command.set_defaults(run=run)
    return command


def add_settings(
    command: argparse.ArgumentParser,
    file: str | None = "CONF.yaml",
    wanted: str = "a YAML file, then settings that replace the file's",
) -> None:
    """Let a command take a file and overrides, which it finds as ``conf`` and ``overrides``.

    Args:
        command: The command.
        file: What the file is called in the help; ``None``: the command takes overrides alone.
        wanted: What to give, for the help.
    """
    metavar = "section.field=value" if file is None else f"{file} | section.field=value"
    command.add_argument("settings", nargs="*", metavar=metavar, help=wanted)
    command.set_defaults(takes_file=file is not None)


def run_command(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Run one command.

    Args:
        parser: Knows the commands.
        argv: Arguments after the program's name; ``None``: those of this process.

    Returns:
        The exit code (see the module's docstring).
    """
    args = _parsed(parser, argv)
    # A reward named `module:function` is looked up in the working directory, as `python script.py` would find it.
    sys.path.insert(0, os.getcwd())
    try:
        with _sigterm_raises():
            code: int = args.run(args)
            return code
    except RLHFRayError as error:
        say(f"error: {error}")
        return _WRONG_INPUT if isinstance(error, (ConfigError, DataError)) else _FAILED
    except KeyboardInterrupt:
        return _TERMINATED if _sigterm.is_set() else _INTERRUPTED
    except SystemExit:
        # Until the algorithm is built, ray.init's own SIGTERM handler is in place, which ends by SystemExit.
        return _TERMINATED
    except Exception:
        # An error of an unknown kind: the user gets its traceback and the shell a failure.
        traceback.print_exc()
        return _FAILED


def install_sigterm() -> None:
    """Let SIGTERM raise ``KeyboardInterrupt``, the one exception that may leave a wait inside Ray."""

    def raise_terminated(signum: int, frame: object) -> NoReturn:
        # Schedulers repeat themselves; the second one must not cut the clean stop short.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _sigterm.set()
        raise KeyboardInterrupt  # _sigterm tells it from Ctrl-C.

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, raise_terminated)


def say(text: str) -> None:
    """Write a line to standard error."""
    # sys.stderr itself, not a console on it: while the live panel is up it is a place above the panel.
    sys.stderr.write(f"{text}\n")


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    previous: Any = signal.getsignal(signal.SIGTERM)
    _sigterm.clear()
    install_sigterm()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, previous)


def _parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    args, late = parser.parse_known_args(argv)
    if unknown := [text for text in late if text.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    # argparse fills a "*" positional once: what follows an option comes back as unknown.
    if "settings" not in args:
        args.run_dirs += late
        return args
    given = [*args.settings, *late]
    args.conf = given.pop(0) if args.takes_file and given and not _is_override(given[0]) else None
    if wrong := [text for text in given if not _is_override(text)]:
        parser.error(f"{wrong[0]!r} is not an override; write section.field=value, for example training.lr=2e-6")
    args.overrides = given
    return args


def _is_override(text: str) -> bool:
    """Tell ``training.lr=1`` from ``runs/lr=1/conf.yaml``: before the = of an override are names and dots alone."""
    return _OVERRIDE.match(text) is not None
