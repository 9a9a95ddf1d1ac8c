"""The built-in reward functions, by the name that settings use."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any, Literal, ParamSpec, TypeAlias, get_args, get_origin, get_type_hints

from rlhf_ray.config.settings import RewardFunction
from rlhf_ray.config.user_code import nearest
from rlhf_ray.errors import ConfigError

__all__ = [
    "RowCheck",
    "build_reward",
    "built_in",
    "built_in_names",
    "check_known_arguments",
    "is_factory",
    "register",
    "with_row_check",
]

P = ParamSpec("P")

RowCheck: TypeAlias = Callable[[Mapping[str, Any]], None]
"""Takes the columns of a dataset row and raises ``DataError`` where a reward cannot use them."""

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
            f"no built-in reward is called {name!r}{nearest(name, _FACTORIES)} "
            f"(all: {', '.join(built_in_names())}; your own: 'module:function' or 'file.py:function'; "
            f"a model: {{name: reward_model, path: {name}}})",
        )
    factory = _FACTORIES[name]
    _check_arguments(name, factory, arguments, field=field, value=value)
    try:
        return factory(**arguments)
    except ConfigError as error:
        raise ConfigError(field, value, str(error)) from error


def with_row_check(reward: Callable[..., list[float]], check: RowCheck) -> RewardFunction:
    """``reward`` with ``check`` as its ``check_row``, which is called with rows of the datasets before a run starts."""
    reward.check_row = check  # type: ignore[attr-defined]
    return reward


def check_known_arguments(
    name: str, parameters: Mapping[str, inspect.Parameter], arguments: Mapping[str, Any], *, field: str, value: object
) -> None:
    """Check that a function called ``name`` takes all of ``arguments``.

    Raises:
        ConfigError: It does not take one.
    """
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for argument in arguments:
        if argument not in parameters and not takes_any:
            known = f"{nearest(str(argument), parameters)} (all: {', '.join(parameters)})"
            raise ConfigError(field, value, f"{name} takes no argument {argument!r}{known}")


def _check_arguments(
    name: str, factory: Callable[..., RewardFunction], arguments: Mapping[str, Any], *, field: str, value: object
) -> None:
    parameters = inspect.signature(factory).parameters
    check_known_arguments(name, parameters, arguments, field=field, value=value)
    hints = get_type_hints(factory)
    for argument, given in arguments.items():
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
