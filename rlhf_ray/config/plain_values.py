"""Before the loop: values of settings in YAML's types, where functions are ``module:function``, and back."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from rlhf_ray.errors import ConfigError

__all__ = ["plain_value", "restored_value", "shown_value"]

_NOT_RESTORABLE: Final = "<not restorable: "
_files: dict[str, ModuleType] = {}


def plain_value(value: Any) -> Any:
    """Return a value in YAML's types; what YAML cannot hold becomes a reference or a marker."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain_value(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain_value(item) for key, item in value.items()}
    from rlhf_ray.rewards.reward_model.reward import RewardModelReward

    if isinstance(value, RewardModelReward):
        return value.to_spec()
    return _reference(value) or f"{_NOT_RESTORABLE}{_display_name(value)}>"


def _reference(function: Any) -> str | None:
    """Return ``module:function`` or ``file.py:function`` where importing that gives this very object."""
    module_name, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    module = sys.modules.get(module_name) or _files.get(module_name) if isinstance(module_name, str) else None
    if module is None or name is None or _attribute(module, name) is not function:
        return None
    if module_name != "__main__":
        return f"{module_name}:{name}"
    if module.__spec__ is not None:
        return f"{module.__spec__.name}:{name}"
    script = getattr(module, "__file__", None)
    return f"{Path(script).resolve()}:{name}" if script and script.endswith(".py") else None


def restored_value(field: str, value: Any) -> Any:
    """Return a value as it was before :func:`plain_value`, where that can be known."""
    for item in _texts_in(value):
        if item.startswith(_NOT_RESTORABLE):
            section, _, setting = field.partition(".")
            name = item.removeprefix(_NOT_RESTORABLE).removesuffix(">")
            call = f".{section}({name if setting == 'functions' else f'{setting}=...'})"
            raise ConfigError(
                field, item, f"a file cannot hold {name}; delete this line and pass it in Python ({call})"
            )
    if field.startswith("callbacks.") and isinstance(value, str):
        return _imported(field, value)
    return value


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(item)


# Not user_code.py's importer: that leaves a file's module in sys.modules, for pickling.py; here it must not stay there.
def _imported(field: str, reference: str) -> Any:
    origin, colon, name = reference.rpartition(":")
    if not colon or not origin or not name:
        raise ConfigError(field, reference, "write 'module:function' or 'file.py:function'")
    try:
        module = _module_at(Path(origin)) if origin.endswith(".py") else importlib.import_module(origin)
    except Exception as error:  # A user's module may raise anything when it is imported.
        raise ConfigError(field, reference, f"importing {origin} raised {type(error).__name__}: {error}") from error
    found = _attribute(module, name)
    if found is None:
        raise ConfigError(field, reference, f"{origin} has no {name}")
    return found


def _module_at(path: Path) -> ModuleType:
    """Import a file under its own path, once."""
    name = str(path.expanduser().resolve())
    if name not in _files:
        spec = importlib.util.spec_from_file_location(name, name)
        if spec is None or spec.loader is None:
            raise ImportError(f"{name} is not Python")
        module = importlib.util.module_from_spec(spec)
        # Dataclasses look their module up while it runs. It must not stay: what cloudpickle finds there travels by
        # reference, and no other process could import it.
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        finally:
            del sys.modules[name]
        _files[name] = module
    return _files[name]


def _attribute(module: Any, qualified_name: str) -> Any:
    for name in qualified_name.split("."):
        module = getattr(module, name, None)
    return module


def _display_name(value: Any) -> str:
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def shown_value(value: Any) -> str:
    """A value as ``repr`` of a config shows it."""
    if isinstance(value, list):
        return f"[{', '.join(shown_value(item) for item in value)}]"
    if value is None or isinstance(value, (bool, int, float, str, tuple, dict)):
        return repr(value)
    return f"<{_display_name(value)}>"
