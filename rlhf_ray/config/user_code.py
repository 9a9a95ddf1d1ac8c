"""Functions and classes of the user's, which settings name as ``module:name`` or ``file.py:name``."""

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

__all__ = ["bound_arguments", "close_match", "identity", "load_reference", "nearest", "reference_to"]

_files: dict[str, tuple[int, ModuleType]] = {}
"""Name of a file's module -> when the file was written that it was made from, and the module."""


def load_reference(reference: str, *, field: str, value: object) -> Callable[..., Any]:
    """Import the function that ``reference`` names; a file is looked up from the working directory.

    A file is imported once, until it is written again. Its module is not left in ``sys.modules``, because no other
    process could import it: pickled by cloudpickle, what it holds goes to workers by value, so that they need no copy
    of the file.

    Args:
        reference: ``package.module:function`` or ``path/to/file.py:function``.
        field: The setting that names it, for the error.
        value: What that setting holds, for the error.

    Raises:
        ConfigError: The module, the file or the function is missing, importing raised, or it is no function.
    """
    source, _, name = reference.rpartition(":")
    if not source or not name:
        raise ConfigError(field, value, "write 'module:function' or 'file.py:function'")
    path = Path(source).expanduser().resolve() if source.endswith(".py") else None
    if path is not None and not path.is_file():
        raise ConfigError(field, value, f"there is no file {path}")
    try:
        module = importlib.import_module(source) if path is None else _file_module(path)
    except Exception as error:  # A user's module may raise anything when it is imported.
        remedy = f"importing {path or source} raised {type(error).__name__}: {error}"
        if isinstance(error, ModuleNotFoundError) and f"{source}.".startswith(f"{error.name}."):
            remedy = f"no module {error.name!r} on the path: install it, set PYTHONPATH, or name the file: 'file.py:f'"
        raise ConfigError(field, value, remedy) from error
    found = _attribute(module, name)
    if found is None:
        public = [key for key, item in vars(module).items() if callable(item) and not key.startswith("_")]
        raise ConfigError(field, value, f"{source} has no {name!r}{nearest(name, public)}")
    if not callable(found):
        raise ConfigError(field, value, f"{name} is no function but {type(found).__name__}")
    function: Callable[..., Any] = found
    return function


def reference_to(item: object) -> str | None:
    """The ``module:name`` or ``file.py:name`` whose import gives this very object; ``None`` where none does."""
    module, name = _module_of(item), getattr(item, "__qualname__", None)
    if module is None or name is None or _attribute(module, name) is not item:
        return None
    if module.__name__ in _files:
        return f"{module.__file__}:{name}"
    if module.__name__ != "__main__":
        return f"{module.__name__}:{name}"
    if module.__spec__ is not None:
        return f"{module.__spec__.name}:{name}"
    script = getattr(module, "__file__", None)
    return f"{Path(script).resolve()}:{name}" if script and script.endswith(".py") else None


def identity(item: object) -> tuple[str | None, str | None]:
    """What stays the same when the module that defines a function or class is run again: its file and name."""
    named = item if hasattr(item, "__qualname__") else type(item)
    file = getattr(_module_of(item), "__file__", None)
    source = str(Path(file).resolve()) if file else getattr(item, "__module__", None)
    return source, getattr(named, "__qualname__", None)


def bound_arguments(function: object) -> set[str]:
    """Names of the arguments that ``functools.partial`` already gives a value; a second one would replace it."""
    names: set[str] = set()
    while isinstance(function, functools.partial):
        names.update(function.keywords, list(inspect.signature(function.func).parameters)[: len(function.args)])
        function = function.func
    return names


def nearest(name: str, options: Iterable[str]) -> str:
    """``; nearest: 'option'`` for a message about a ``name`` that is spelled much like one of them, else nothing."""
    close = close_match(name, options)
    return f"; nearest: {close!r}" if close else ""


def close_match(name: str, options: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The option that ``name`` is most likely a typing mistake of; ``None``: none is close enough, from 0 to 1."""
    return next(iter(get_close_matches(name, list(options), n=1, cutoff=cutoff)), None)


def _file_module(path: Path) -> ModuleType:
    # A name of its own keeps two files called rewards.py apart.
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    written = path.stat().st_mtime_ns
    if name not in _files or _files[name][0] != written:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is not Python")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # Dataclasses look their module up while it is being run.
        try:
            spec.loader.exec_module(module)
        finally:
            sys.modules.pop(name, None)
        _files[name] = (written, module)
    return _files[name][1]


def _module_of(item: object) -> ModuleType | None:
    name = getattr(item, "__module__", None)
    if not isinstance(name, str):
        return None
    return sys.modules.get(name) or (_files[name][1] if name in _files else None)


def _attribute(module: object, qualified_name: str) -> Any:
    """What a module holds under a name, which may have dots; ``None`` where it holds nothing."""
    for name in qualified_name.split("."):
        module = getattr(module, name, None)
    return module
