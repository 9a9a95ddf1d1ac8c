"""Values with code of the user's as bytes that any process can read."""

from __future__ import annotations

import functools
import inspect
import os
import pickle
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ray import cloudpickle

__all__ = ["deserialize", "serialize"]

# Which modules are pickled by value is the same for all threads: one must not end that while another one pickles.
_PICKLING = threading.RLock()


def serialize(value: object, *, defined_by: object) -> bytes:
    """Pickle ``value``; code of the module that defines ``defined_by`` is included where workers cannot import it.

    This process's module path is included too, as with Python's own ``multiprocessing``.

    Args:
        value: What is pickled.
        defined_by: An object that the user defined, or a list of some.
    """
    with _pickled_by_value(defined_by):
        pickled: bytes = cloudpickle.dumps(value)
    return pickle.dumps(([os.path.abspath(entry) for entry in sys.path], pickled))


def deserialize(payload: bytes) -> object:
    """The value of :func:`serialize`."""
    path, pickled = pickle.loads(payload)
    sys.path.extend(entry for entry in path if entry not in sys.path)
    return cloudpickle.loads(pickled)


@contextmanager
def _pickled_by_value(value: object) -> Iterator[None]:
    """Within, cloudpickle writes out the module of ``value`` instead of naming it, where only this process has it."""
    defined = value if isinstance(value, list) else [value]
    names = {name for one in defined for name in _module_names(one) if not _importable(name)}
    modules = [sys.modules[name] for name in names if name in sys.modules]
    with _PICKLING:
        for module in modules:
            cloudpickle.register_pickle_by_value(module)
        try:
            yield
        finally:
            for module in modules:
                cloudpickle.unregister_pickle_by_value(module)


def _module_names(value: object) -> set[str]:
    while isinstance(value, functools.partial):
        value = value.func
    inner = inspect.unwrap(value) if callable(value) else value
    owners = (value, type(value), inner, type(inner), getattr(inner, "__self__", None))
    return {name for owner in owners if isinstance(name := getattr(owner, "__module__", None), str)} - {"__main__"}


def _importable(module_name: str) -> bool:
    """Whether a fresh process with this one's path could import the module: not one that was loaded from a file."""
    top = module_name.partition(".")[0]
    finders = [finder for finder in sys.meta_path if hasattr(finder, "find_spec")]
    return any(finder.find_spec(top, None) is not None for finder in finders)
