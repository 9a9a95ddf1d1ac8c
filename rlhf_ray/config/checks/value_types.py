"""Before the loop: the type of one setting, checked at once when it is set, from Python and from YAML alike."""

from __future__ import annotations

import numbers
import os
import re
import sys
import types
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from rlhf_ray.config.settings import Settings
from rlhf_ray.errors import ConfigError

__all__ = ["check_resolved", "section_types", "setting_types", "typed_value"]


class _WrongTypeError(Exception):
    """A value does not fit an annotation; becomes a ConfigError where the field is known."""


_NUMBER_TEXT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
# YAML reads these as text, which would pass for a hub id or a folder.
_NONE_WORDS = ("None", "none")
_TYPE_NAMES: Final[Mapping[Any, str]] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a string",
    types.NoneType: "None",
}
_YAML_NAMES: Final[Mapping[Any, str]] = {
    bool: "true or false",
    str: "a string (in quotes if YAML reads it otherwise)",
    types.NoneType: "null",
    Any: "a value or null",
}


@cache
def section_types() -> Mapping[str, type]:
    """Return every section's name and its dataclass, in order."""
    return types.MappingProxyType(get_type_hints(Settings))


@cache
def setting_types(section: str) -> Mapping[str, Any]:
    """Return the names and the annotations of one section, in order."""
    return types.MappingProxyType(get_type_hints(section_types()[section]))


def typed_value(field: str, value: Any, *, from_text: bool = False) -> Any:
    """Return a value as its setting holds it: containers copied, paths as strings, numpy scalars as Python's.

    Args:
        field: Dotted name of an existing setting.
        value: What was given. A Ray Tune search space passes; ``validate`` refuses it.
        from_text: Whether it was read from YAML, where a quoted number may stand for a float.

    Raises:
        ConfigError: The value has the wrong type.
    """
    section, _, name = field.partition(".")
    annotation = setting_types(section)[name]
    if _is_search_space(value):
        return value
    try:
        return _convert(annotation, value, from_text)
    except _WrongTypeError:
        raise ConfigError(field, value, f"give {_describe(annotation, from_text)}") from None


def check_resolved(field: str, value: Any) -> None:
    """Refuse a search space: a run needs one value."""
    if _is_search_space(value):
        raise ConfigError(field, value, "a search space needs Ray Tune: tune.Tuner(..., param_space=config)")


def _is_search_space(value: Any) -> bool:
    """Whether a value is Ray Tune's: a domain such as ``tune.loguniform(...)``, or a grid search."""
    if isinstance(value, Mapping):
        return set(value) == {"grid_search"}
    # A domain can only exist where its module was imported.
    samples = sys.modules.get("ray.tune.search.sample")
    return samples is not None and isinstance(value, samples.Domain)


def _convert(annotation: Any, value: Any, from_text: bool) -> Any:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, from_text)
    if origin is Literal:
        return _require(isinstance(value, str) and value in args, value)
    if origin is list:
        items = _require(isinstance(value, (list, tuple)), value)
        return [_convert(args[0], item, from_text) for item in items]
    if origin is tuple:
        items = _require(isinstance(value, (list, tuple)) and len(value) == len(args), value)
        return tuple(_convert(arg, item, from_text) for arg, item in zip(args, items, strict=True))
    if origin in (dict, Mapping):
        return _convert_any(_require(isinstance(value, Mapping) and all(isinstance(key, str) for key in value), value))
    if origin is Callable:
        return _require(callable(value), value)
    return _convert_scalar(annotation, value, from_text)


def _convert_union(members: tuple[Any, ...], value: Any, from_text: bool) -> Any:
    if value is None and types.NoneType in members:
        return None
    if from_text and types.NoneType in members and value in _NONE_WORDS:
        raise _WrongTypeError
    for member in members:
        with suppress(_WrongTypeError):
            return _convert(member, value, from_text)
    raise _WrongTypeError


def _convert_scalar(annotation: Any, value: Any, from_text: bool) -> Any:
    if annotation is bool:
        return _require(isinstance(value, bool), value)
    if annotation is int:
        return int(_require(isinstance(value, numbers.Integral) and not isinstance(value, bool), value))
    if annotation is float:
        is_text = from_text and isinstance(value, str) and _NUMBER_TEXT.fullmatch(value)
        return float(_require(is_text or (isinstance(value, numbers.Real) and not isinstance(value, bool)), value))
    if annotation is str:
        return str(_require(isinstance(value, (str, os.PathLike)), value))
    return _convert_any(_require(annotation is Any and not (from_text and value in _NONE_WORDS), value))


def _convert_any(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_convert_any(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _convert_any(item) for key, item in value.items()}
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _require(fits: object, value: Any) -> Any:
    if not fits:
        raise _WrongTypeError
    return value


def _describe(annotation: Any, from_text: bool) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(member, from_text) for member in args)
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in args)
    if origin is list:
        return f"a list, each item {_describe(args[0], from_text)}"
    if origin is tuple:
        return f"{len(args)} items, each {_describe(args[0], from_text)}"
    if origin in (dict, Mapping):
        return "a mapping with string keys"
    if origin is Callable:
        return "'module:function'" if from_text else "a function"
    return {**_TYPE_NAMES, **(_YAML_NAMES if from_text else {})}[annotation]
