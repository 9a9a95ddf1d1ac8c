"""Before the loop: functions of the user's, which settings name as ``module:function`` or ``file.py:function``."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_ray.errors import ConfigError

__all__ = ["bound_arguments", "load_reference", "nearest"]


def load_reference(reference: str, *, field: str, value: object) -> Callable[..., Any]:
    """Import the function that ``reference`` names; a file is looked up from the working directory.

    Args:
        reference: ``package.module:function`` or ``path/to/file.py:function``.
        field: The setting that names it, for the error.
        value: What that setting holds, for the error.

    Raises:
        ConfigError: The module, the file or the function is missing, importing raised, or it is no function.
    """
    source, _, attribute = reference.rpartition(":")
    module = _load_file(source, field, value) if source.endswith(".py") else _load_module(source, field, value)
    if not hasattr(module, attribute):
        public = [key for key, item in vars(module).items() if callable(item) and not key.startswith("_")]
        raise ConfigError(field, value, f"{source} has no {attribute!r}{nearest(attribute, public)}")
    function: Callable[..., Any] = getattr(module, attribute)
    if not callable(function):
        raise ConfigError(field, value, f"{attribute} is no function but {type(function).__name__}")
    return function


def bound_arguments(function: object) -> set[str]:
    """Names of the arguments that ``functools.partial`` already gives a value; a second one would replace it."""
    names: set[str] = set()
    while isinstance(function, functools.partial):
        names.update(function.keywords, list(inspect.signature(function.func).parameters)[: len(function.args)])
        function = function.func
    return names


def nearest(name: str, options: Iterable[str]) -> str:
    """``; nearest: 'option'`` for a message about a ``name`` that is spelled much like one of them, else nothing."""
    close = get_close_matches(name, list(options), n=1)
    return f"; nearest: {close[0]!r}" if close else ""


def _load_module(name: str, field: str, value: object) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            remedy = f"no module {error.name!r} on the path: install it, set PYTHONPATH, or name the file: 'file.py:f'"
            raise ConfigError(field, value, remedy) from error
        raise _import_failure(name, error, field, value) from error
    except Exception as error:  # A user's module may raise anything when it is imported.
        raise _import_failure(name, error, field, value) from error


def _load_file(source: str, field: str, value: object) -> ModuleType:
    path = Path(source).expanduser().resolve()
    if not path.is_file():
        raise ConfigError(field, value, f"there is no file {path}")
    # A name of its own keeps two files called rewards.py apart, and can be imported nowhere: such functions travel
    # to the workers by value, so that the file need not lie on their machines.
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(field, value, f"{path} cannot be imported as Python")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # Dataclasses look their module up while it is being run.
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # A user's file may raise anything when it is imported.
        del sys.modules[name]
        raise _import_failure(str(path), error, field, value) from error
    return module


def _import_failure(source: str, error: Exception, field: str, value: object) -> ConfigError:
    return ConfigError(field, value, f"importing {source} raised {type(error).__name__}: {error}")
