"""The value of one setting, held against its declaration: the type when it is set, the bounds before a run."""

from __future__ import annotations

import numbers
import os
import re
import sys
import types
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Literal, Union, get_args, get_origin

from rlhf_ray.config.plain_values import check_restorable
from rlhf_ray.config.settings import declaration, setting_types
from rlhf_ray.config.user_code import load_reference
from rlhf_ray.errors import ConfigError

__all__ = ["check_value", "typed_value"]

# What floating point still counts exactly; larger numbers overflow here and there.
_LARGEST: Final = 2**53
_NUMBER_TEXT: Final = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
# YAML reads these as text, which would pass for a hub id or a folder.
_NONE_WORDS: Final = ("None", "none")
_UNIONS: Final = (Union, types.UnionType)
_TYPE_NAMES: Final[Mapping[Any, tuple[str, str]]] = {
    bool: ("True or False", "true or false"),
    int: ("an integer", "an integer"),
    float: ("a number", "a number"),
    str: ("a string", "a string (in quotes if YAML reads it otherwise)"),
    types.NoneType: ("None", "null"),
    Any: ("a value", "a value or null"),
    Callable: ("a function", "'module:function'"),
}
"""What an annotation asks for, from Python and from YAML."""


def typed_value(field: str, value: Any, *, from_text: bool = False) -> Any:
    """Return a value as its setting holds it: containers copied, paths as strings, numpy scalars as Python's.

    Args:
        field: Dotted name of an existing setting.
        value: What was given. A Ray Tune search space passes; :func:`check_value` refuses it.
        from_text: Whether it was read from YAML, where a quoted number may be meant as a float.

    Raises:
        ConfigError: The value has the wrong type, or marks something that YAML could not hold.
    """
    section, _, name = field.partition(".")
    if _is_search_space(value):
        return value
    check_restorable(field, value)
    return _Conversion(field, from_text).checked(setting_types(section)[name], value)


def check_value(field: str, value: Any) -> None:
    """Check all that can be said about one setting by itself.

    Raises:
        ConfigError: It is a search space, has the wrong type, is out of its bounds, or is an empty text.
    """
    if _is_search_space(value):
        raise ConfigError(field, value, "a search space needs Ray Tune: tune.Tuner(..., param_space=config)")
    typed_value(field, value)
    declared = declaration(field).metadata
    for item in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(item, str) and not item:
            raise ConfigError(field, value, "must not be empty; write a text, or leave the setting out")
        if isinstance(item, int) and abs(item) > _LARGEST:
            raise ConfigError(field, value, f"must be a number of at most {_LARGEST:,}")
        if isinstance(item, (int, float)) and not isinstance(item, bool) and item not in declared["bounds"]:
            of_none = re.search(r"(?:unset|null): (.+)", declared["meaning"])
            or_none = f", or None ({of_none[1]})" if of_none else ""
            raise ConfigError(field, value, f"must be {declared['bounds']}{or_none}")


def _is_search_space(value: Any) -> bool:
    """Whether a value is Ray Tune's: a domain such as ``tune.loguniform(...)``, or a grid search."""
    if isinstance(value, Mapping):
        return set(value) == {"grid_search"}
    # A domain can only exist where its module was imported.
    samples = sys.modules.get("ray.tune.search.sample")
    return samples is not None and isinstance(value, samples.Domain)


class _WrongTypeError(Exception):
    """A value does not fit an annotation."""


@dataclass(frozen=True, slots=True)
class _Conversion:
    """Values of one setting, made what an annotation says."""

    field: str
    from_text: bool

    def checked(self, annotation: Any, value: Any) -> Any:
        try:
            return self._converted(annotation, value)
        except _WrongTypeError:
            raise ConfigError(self.field, value, f"must be {self._described(annotation)}") from None

    def _converted(self, annotation: Any, value: Any) -> Any:
        origin, args = get_origin(annotation), get_args(annotation)
        if origin in _UNIONS:
            return self._first_that_fits(args, value)
        if origin is Literal:
            return _require(isinstance(value, str) and value in args, value)
        if origin is list:
            return [self._converted(args[0], item) for item in _require(isinstance(value, (list, tuple)), value)]
        if origin is tuple:
            items = _require(isinstance(value, (list, tuple)) and len(value) == len(args), value)
            return tuple(self._converted(arg, item) for arg, item in zip(args, items, strict=True))
        if origin in (dict, Mapping):
            items = _require(isinstance(value, Mapping) and all(isinstance(key, str) for key in value), value)
            if args[1] is Any:
                return _copied(items)
            of_item = {key: _Conversion(f"{self.field}.{key}", self.from_text) for key in items}
            return {key: of_item[key].checked(args[1], item) for key, item in items.items()}
        if origin is Callable:
            if isinstance(value, str):
                return load_reference(value, field=self.field, value=value)
            return _require(callable(value), value)
        return self._converted_scalar(annotation, value)

    def _first_that_fits(self, members: tuple[Any, ...], value: Any) -> Any:
        if value is None and types.NoneType in members:
            return None
        if self.from_text and types.NoneType in members and value in _NONE_WORDS:
            raise _WrongTypeError
        for member in members:
            with suppress(_WrongTypeError):
                return self._converted(member, value)
        raise _WrongTypeError

    def _converted_scalar(self, annotation: Any, value: Any) -> Any:
        is_number = not isinstance(value, bool)
        if annotation is bool:
            return _require(isinstance(value, bool), value)
        if annotation is int:
            return int(_require(is_number and isinstance(value, numbers.Integral), value))
        if annotation is float:
            is_text = self.from_text and isinstance(value, str) and _NUMBER_TEXT.fullmatch(value)
            return float(_require(is_text or (is_number and isinstance(value, numbers.Real)), value))
        if annotation is str:
            return str(_require(isinstance(value, (str, os.PathLike)), value))
        return _copied(_require(annotation is Any and not (self.from_text and value in _NONE_WORDS), value))

    def _described(self, annotation: Any) -> str:
        origin, args = get_origin(annotation), get_args(annotation)
        if origin in _UNIONS:
            return " or ".join(self._described(member) for member in args)
        if origin is Literal:
            return "one of " + ", ".join(repr(choice) for choice in args)
        if origin is list:
            return f"a list, each item {self._described(args[0])}"
        if origin is tuple:
            return f"{len(args)} items, each {self._described(args[0])}"
        if origin in (dict, Mapping):
            return "a mapping with string keys"
        return _TYPE_NAMES[origin or annotation][self.from_text]


def _copied(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_copied(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _require(fits: object, value: Any) -> Any:
    if not fits:
        raise _WrongTypeError
    return value
