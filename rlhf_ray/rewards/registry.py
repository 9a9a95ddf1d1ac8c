"""Rewards, before a run starts: the built-in reward functions, by the name that settings use."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import NoneType
from typing import Any, Literal, ParamSpec, get_args, get_origin, get_type_hints

from rlhf_ray.errors import ConfigError
from rlhf_ray.settings import RewardFunction

__all__ = ["build_reward", "built_in", "built_in_names", "is_factory", "nearest", "register"]

P = ParamSpec("P")

_FACTORIES: dict[str, Callable[..., RewardFunction]] = {}


def built_in(factory: Callable[P, RewardFunction]) -> Callable[P, RewardFunction]:
    """Register a factory of reward functions under its own name.

    The functions that it makes carry that name too, so that reports call them what the settings call them.
    """

    @functools.wraps(factory)
    def build(*args: P.args, **kwargs: P.kwargs) -> RewardFunction:
        reward = factory(*args, **kwargs)
        reward.__name__ = factory.__name__
        return reward

    _FACTORIES[factory.__name__] = build
    return build


def register(name: str, factory: Callable[..., RewardFunction]) -> None:
    """Let settings call a factory by ``name``; what it makes need not carry that name."""
    _FACTORIES[name] = factory


def built_in_names() -> tuple[str, ...]:
    """Names of the built-in rewards, sorted."""
    return tuple(sorted(_FACTORIES))


def is_factory(function: object) -> bool:
    """Whether ``function`` is a built-in's factory, which makes reward functions and is not one."""
    return any(function is factory for factory in _FACTORIES.values())


def build_reward(name: str, arguments: Mapping[str, Any], *, field: str, value: object) -> RewardFunction:
    """Make the built-in reward ``name`` with ``arguments``.

    Args:
        name: A registered name.
        arguments: Keyword arguments of its factory.
        field: The setting that asks for it, for the error.
        value: What that setting holds, for the error.

    Raises:
        ConfigError: The name or an argument is unknown, one is missing, or one has a wrong type or value.
    """
    if name not in _FACTORIES:
        raise ConfigError(
            field,
            value,
            f"no built-in reward is called {name!r}; nearest: {nearest(name, _FACTORIES)!r} "
            f"(all: {', '.join(built_in_names())}; your own: 'module:function' or 'file.py:function')",
        )
    factory = _FACTORIES[name]
    _check_arguments(name, factory, arguments, field=field, value=value)
    try:
        return factory(**arguments)
    except ConfigError as error:
        raise ConfigError(field, value, str(error)) from error


def nearest(name: str, options: Iterable[str]) -> str | None:
    """The option spelled most like ``name``; none where there are no options."""
    return next(iter(difflib.get_close_matches(name, list(options), n=1, cutoff=0.0)), None)


def _check_arguments(
    name: str, factory: Callable[..., RewardFunction], arguments: Mapping[str, Any], *, field: str, value: object
) -> None:
    parameters = inspect.signature(factory).parameters
    hints = get_type_hints(factory)
    for argument, given in arguments.items():
        if argument not in parameters:
            raise ConfigError(
                field,
                value,
                f"{name} takes no argument {argument!r}; nearest: {nearest(str(argument), parameters)!r} "
                f"(all: {', '.join(parameters)})",
            )
        if not _has_type(given, hints[argument]):
            wanted = " or ".join(_type_names(hints[argument]))
            raise ConfigError(field, value, f"{name}'s {argument} must be {wanted}, not {type(given).__name__}")
    missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in arguments]
    if missing:
        raise ConfigError(field, value, f"{name} needs {', '.join(missing)}: {{name: {name}, {missing[0]}: ...}}")


def _has_type(given: object, hint: Any) -> bool:
    options = get_args(hint) or (hint,)
    if get_origin(hint) is Literal:
        return given in options
    if isinstance(given, bool):
        return bool in options
    return isinstance(given, options) or (float in options and isinstance(given, int))


def _type_names(hint: Any) -> list[str]:
    options = get_args(hint) or (hint,)
    if get_origin(hint) is Literal:
        return [repr(option) for option in options]
    return ["none" if option is NoneType else option.__name__ for option in options]
