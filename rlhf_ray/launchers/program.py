"""What is launched: a script or a configuration with its overrides, as a command line that any backend can run."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf_ray.command import Commands, add_command, add_settings, load_config, run_command
from rlhf_ray.config.builder import AlgorithmConfig
from rlhf_ray.errors import ConfigError

__all__ = ["REPEATED", "Program", "add_backend", "main"]

REPEATED: dict[str, Any] = {"action": "append", "default": []}
"""Of an option that may be given several times."""
_ARGUMENT = "SCRIPT_OR_CONF"
_VARIABLE = re.compile(r"[A-Za-z_]\w*")


def add_backend(
    backends: Commands, name: str, run: Callable[[argparse.Namespace], int], summary: str
) -> argparse.ArgumentParser:
    """Add a backend with the options that all of them share; its own come after."""
    parser = add_command(backends, name, run, summary)
    add_settings(
        parser,
        _ARGUMENT,
        "a Python script (.py) or a configuration (.yaml), then overrides: settings for the configuration, "
        "arguments for the script",
    )
    parser.add_argument("--config", metavar="FILE", help="configuration that a script gets as --config FILE")
    parser.add_argument(
        "--env", metavar="NAME=VALUE", help="environment variable of the run; as often as needed", **REPEATED
    )
    parser.set_defaults(working_dir=".", no_check=False)
    return parser


def main(name: str, add: Callable[[Commands], None]) -> int:
    """Run one backend with the arguments of this process, which are those of ``rlhf-ray launch NAME``.

    Args:
        name: The backend's.
        add: Adds its command.
    """
    parser = argparse.ArgumentParser(prog="rlhf-ray launch")
    add(parser.add_subparsers())
    return run_command(parser, [name, *sys.argv[1:]])


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A script or a configuration, what it is given and where it runs."""

    path: Path
    """The script or configuration; absolute."""
    config_file: Path | None
    """Configuration that a script gets as ``--config``; absolute."""
    overrides: tuple[str, ...]
    """``section.field=value``, in the order of the command line."""
    working_dir: Path
    """Folder in which it will run; absolute."""
    variables: dict[str, str]
    """Environment variables that it is given."""
    config: AlgorithmConfig
    """Its settings, as far as they can be read here."""

    @classmethod
    def of(cls, args: argparse.Namespace) -> Program:
        """Read the command line, and the settings where the run will read them: no mistake waits in a queue.

        Of a script that brings its own settings, only the overrides' names and types can be checked.

        Args:
            args: With the options of :func:`add_backend`, ``working_dir``, and ``no_check`` for settings whose values
                and combinations cannot be checked here.

        Raises:
            ConfigError: There is no script or configuration, it is neither, or ``--config`` cannot go with it; or there
                is no such folder, or a setting is wrong.
        """
        if args.conf is None:
            raise ConfigError(_ARGUMENT, None, "name a script (.py) or a configuration (.yaml) to launch")
        path = _file(_ARGUMENT, args.conf, (".py", ".yaml", ".yml"))
        if args.config is not None and path.suffix != ".py":
            raise ConfigError("--config", args.config, f"{path.name} is a configuration itself; give one of the two")
        config_file = None if args.config is None else _file("--config", args.config, (".yaml", ".yml"))
        working_dir = Path(os.path.abspath(args.working_dir))
        if not working_dir.is_dir():
            raise ConfigError("--working-dir", args.working_dir, "no such folder")
        variables = _variables(args.env)
        with _within(working_dir):
            source = config_file if path.suffix == ".py" else path
            config = load_config(source, args.overrides)
            if source is not None and not args.no_check:
                config.validate()
        return cls(
            path=path,
            config_file=config_file,
            overrides=tuple(args.overrides),
            working_dir=working_dir,
            variables=variables,
            config=config,
        )

    @property
    def is_script(self) -> bool:
        """Whether this is a Python script."""
        return self.path.suffix == ".py"

    @property
    def shows_settings(self) -> bool:
        """Whether the run's settings can be read here; a script without ``--config`` brings its own."""
        return self.config_file is not None or not self.is_script

    def with_override(self, override: str) -> Program:
        """Give the program one more override, which counts most."""
        return replace(self, overrides=(*self.overrides, override))

    def command(self, python: str, *, only_inside: bool = False) -> list[str]:
        """Write the command line; files below the working directory are named relative to it.

        Args:
            python: The interpreter.
            only_inside: Whether nothing outside of the working directory exists where it runs.

        Raises:
            ConfigError: A file lies outside where nothing may.
        """

        def name(field: str, path: Path) -> str:
            if path.is_relative_to(self.working_dir):
                # With ./ a name never looks like an option or an override.
                return os.path.join(".", path.relative_to(self.working_dir))
            if only_inside:
                remedy = f"outside of {self.working_dir}, which is all that is uploaded; set --working-dir, or "
                raise ConfigError(field, str(path), f"{remedy}--no-upload")
            return str(path)

        start = [python] if self.is_script else [python, "-m", "rlhf_ray.cli", "train"]
        config = [] if self.config_file is None else ["--config", name("--config", self.config_file)]
        return [*start, name(_ARGUMENT, self.path), *config, *self.overrides]


def _variables(assignments: Sequence[str]) -> dict[str, str]:
    found = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not _VARIABLE.fullmatch(name):
            raise ConfigError("--env", assignment, "write NAME=VALUE")
        found[name] = value
    return found


def _file(field: str, given: str, suffixes: tuple[str, ...]) -> Path:
    path = Path(os.path.abspath(Path(given).expanduser()))
    if path.suffix not in suffixes:
        raise ConfigError(field, given, f"the name must end in {' or '.join(suffixes)}")
    if not path.is_file():
        raise ConfigError(field, given, "no such file")
    return path


@contextlib.contextmanager
def _within(folder: Path) -> Iterator[None]:
    """Resolve relative paths and the modules of reward functions as a program in ``folder`` does."""
    sys.path.insert(0, str(folder))
    try:
        with contextlib.chdir(folder):
            yield
    finally:
        sys.path.remove(str(folder))
