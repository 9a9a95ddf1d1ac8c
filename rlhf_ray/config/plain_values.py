"""Values of settings: copied, shown, and in YAML's types, where a function is ``module:function``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from rlhf_ray.config.user_code import reference_to
from rlhf_ray.errors import ConfigError

__all__ = ["check_restorable", "copied", "plain_value", "shown_value"]

_NOT_RESTORABLE: Final = "<not restorable: "


def copied(value: Any) -> Any:
    """A copy of lists and dictionaries, at all levels, that share what else they hold."""
    if isinstance(value, list):
        return [copied(item) for item in value]
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return value


def plain_value(value: Any) -> Any:
    """Return a value in YAML's types; what YAML cannot hold becomes a reference or a marker."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain_value(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain_value(item) for key, item in value.items()}
    if hasattr(value, "to_spec"):  # A reward model, whose settings are a mapping.
        return value.to_spec()
    return reference_to(value) or f"{_NOT_RESTORABLE}{_display_name(value)}>"


def check_restorable(field: str, value: Any) -> None:
    """Refuse the marker of something that :func:`plain_value` could not write.

    Raises:
        ConfigError: The value is one, or holds one.
    """
    for text in _texts_in(value):
        if text.startswith(_NOT_RESTORABLE):
            section, _, setting = field.partition(".")
            name = text.removeprefix(_NOT_RESTORABLE).removesuffix(">")
            call = f".{section}({name if setting == 'functions' else f'{setting}=...'})"
            raise ConfigError(
                field, text, f"a file cannot hold {name}; delete this line and pass it in Python ({call})"
            )


def shown_value(value: Any) -> str:
    """A value as ``repr`` of a config shows it."""
    if isinstance(value, list):
        return f"[{', '.join(shown_value(item) for item in value)}]"
    if value is None or isinstance(value, (bool, int, float, str, tuple, dict)):
        return repr(value)
    return f"<{_display_name(value)}>"


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(item)


def _display_name(value: Any) -> str:
    return str(getattr(value, "__qualname__", type(value).__qualname__))
