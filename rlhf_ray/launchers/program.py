"""What is launched: a script or a configuration with its overrides, as a command line that any backend can run."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_ray.errors import ConfigError

if TYPE_CHECKING:
    from rlhf_ray.config.builder import AlgorithmConfig

__all__ = ["Program", "environment"]

_ARGUMENT = "SCRIPT_OR_CONF"
_VARIABLE = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A script or a configuration, and what it is given."""

    path: Path
    """The script or configuration; absolute."""
    config: Path | None
    """Configuration that a script gets as ``--config``; absolute."""
    overrides: tuple[str, ...]
    """``section.field=value``, in the order of the command line."""

    @classmethod
    def of(cls, args: argparse.Namespace) -> Program:
        """Read the command line.

        Args:
            args: With ``conf`` (the first word that is no override), ``config`` and ``overrides``.

        Raises:
            ConfigError: There is no script or configuration, it is neither, or ``--config`` cannot go with it.
        """
        if args.conf is None:
            raise ConfigError(_ARGUMENT, None, "name a script (.py) or a configuration (.yaml) to launch")
        path = _file(_ARGUMENT, args.conf, (".py", ".yaml", ".yml"))
        if args.config is not None and path.suffix != ".py":
            raise ConfigError("--config", args.config, f"{path.name} is a configuration itself; give one of the two")
        config = None if args.config is None else _file("--config", args.config, (".yaml", ".yml"))
        return cls(path=path, config=config, overrides=tuple(args.overrides))

    @property
    def is_script(self) -> bool:
        """Whether this is a Python script."""
        return self.path.suffix == ".py"

    @property
    def shows_settings(self) -> bool:
        """Whether the run's settings can be read here; a script without ``--config`` brings its own."""
        return self.config is not None or not self.is_script

    def configured(self, working_dir: Path, *, validate: bool = True) -> AlgorithmConfig:
        """Read the settings where the run will read them, so that a mistake does not wait in a queue.

        Of a script that brings its own, only the overrides' names and types can be looked at.

        Args:
            working_dir: Folder in which the program will run.
            validate: Whether to check values and combinations too.

        Raises:
            ConfigError: A setting is wrong.
        """
        from rlhf_ray.cli import load_config

        source = self.config if self.is_script else self.path
        with _standing_in(working_dir):
            config = load_config(None if source is None else str(source), self.overrides)
            if validate and self.shows_settings:
                config.validate()
        return config

    def with_override(self, override: str) -> Program:
        """Give the program one more override, which counts most."""
        return replace(self, overrides=(*self.overrides, override))

    def command(self, python: str, *, working_dir: Path, only_inside: bool = False) -> list[str]:
        """Write the command line.

        Args:
            python: The interpreter.
            working_dir: Where it runs; files below it are named relative to it.
            only_inside: Whether nothing outside of ``working_dir`` exists there.

        Raises:
            ConfigError: A file lies outside where nothing may.
        """

        def name(field: str, path: Path) -> str:
            if path.is_relative_to(working_dir):
                # With ./ a name never looks like an option or an override.
                return os.path.join(".", path.relative_to(working_dir))
            if only_inside:
                remedy = f"outside of {working_dir}, which is all that is uploaded; set --working-dir, or --no-upload"
                raise ConfigError(field, str(path), remedy)
            return str(path)

        start = [python] if self.is_script else [python, "-m", "rlhf_ray.cli", "train"]
        config = [] if self.config is None else ["--config", name("--config", self.config)]
        return [*start, name(_ARGUMENT, self.path), *config, *self.overrides]


def environment(assignments: Sequence[str]) -> dict[str, str]:
    """Read ``--env NAME=VALUE``.

    Raises:
        ConfigError: One of them is no assignment.
    """
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
def _standing_in(folder: Path) -> Iterator[None]:
    """Resolve relative paths and the modules of reward functions as a program in ``folder`` does."""
    sys.path.insert(0, str(folder))
    try:
        with contextlib.chdir(folder):
            yield
    finally:
        sys.path.remove(str(folder))
