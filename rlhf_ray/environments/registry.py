"""What ``environment`` names in the settings becomes: environments by name, checked, ready to travel to workers."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from rlhf_ray.config.settings import EnvironmentSettings
from rlhf_ray.config.user_code import bound_arguments, load_reference, nearest
from rlhf_ray.errors import ConfigError

__all__ = ["BUILT_IN", "NamedEnvironment", "resolve_environments"]

BUILT_IN: Final[Mapping[str, str]] = {
    "calculator": "rlhf_ray.quickstart.calculator:Calculator",
    "openenv": "rlhf_ray.environments.openenv:OpenEnvEnvironment",
}
"""Name of an environment of the library -> its class."""
_METHODS: Final = ("reset", "step")


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedEnvironment:
    """An environment of a run."""

    name: str
    """What reports call it, and rows that choose among several."""
    make: Callable[[], Any]
    """Makes the object that plays an episode; of an agent its function, or the command of its program."""
    defined_by: Any
    """What the user wrote, by which the code to send to workers is found."""
    is_agent: bool = False
    tools: tuple[Mapping[str, Any], ...] = ()
    """Schemas of the tools that prompts name."""

    @property
    def deterministic(self) -> bool:
        """Whether an episode can be played again from what was sampled."""
        return bool(getattr(_unbound(self.defined_by), "deterministic", True))

    def serialized(self) -> bytes:
        """As bytes for another process, including code that cannot be imported there.

        Raises:
            ConfigError: The environment holds something that cannot be sent.
        """
        from rlhf_ray.pickling import serialize  # Imports Ray.

        try:
            return serialize(self, defined_by=self.defined_by)
        except Exception as error:  # Pickling runs the __reduce__ of whatever the arguments hold.
            remedy = (
                f"cannot be sent to a worker ({type(error).__name__}: {error}); make what it holds in reset(), or in "
                "the tool"
            )
            raise ConfigError("environment.name", self.name, remedy) from error


def resolve_environments(settings: EnvironmentSettings) -> tuple[NamedEnvironment, ...]:
    """Find and check the environments of a run.

    Raises:
        ConfigError: One is missing or misspelled, is no environment, or is given arguments that it does not take.
    """
    if settings.agent is not None:
        return (_agent(settings.agent),)
    if settings.tools:
        return (_tools(settings),)
    if settings.name is None:
        return ()
    if settings.column is None:
        return (_environment(settings.name, "environment.name", None),)
    return tuple(_environment(spec, f"environment.name.{name}", name) for name, spec in settings.name.items())


def _tools(settings: EnvironmentSettings) -> NamedEnvironment:
    from rlhf_ray.environments.tools import ToolEnvironment, resolve_tools

    sources = resolve_tools(settings.tools)
    return NamedEnvironment(
        name="tools",
        make=functools.partial(ToolEnvironment, sources, on_error=settings.tool_errors),
        defined_by=ToolEnvironment,
        tools=tuple(schema for source in sources for schema in source.schemas),
    )


def _agent(agent: Any) -> NamedEnvironment:
    if isinstance(agent, Mapping):
        command = agent.get("command")
        if set(agent) != {"command"} or not command or not isinstance(command, (str, list)):
            raise ConfigError("environment.agent", agent, "write {command: [python, agent.py]}")
        return NamedEnvironment(name="agent", make=lambda: dict(agent), defined_by=None, is_agent=True)
    function = load_reference(agent, field="environment.agent", value=agent) if isinstance(agent, str) else agent
    if not callable(function):
        remedy = "must be a function solve(row, client), 'module:function', 'file.py:function' or {command: [...]}"
        raise ConfigError("environment.agent", agent, remedy)
    parameters = inspect.signature(function).parameters
    if missing := [name for name in ("row",) if name not in parameters]:
        remedy = f"the function must take {missing[0]!r}: solve(row, client), or solve(row, base_url, api_key)"
        raise ConfigError("environment.agent", getattr(function, "__name__", agent), remedy)
    name = _plain_name(getattr(function, "__name__", "agent"))
    return NamedEnvironment(name=name, make=functools.partial(_itself, function), defined_by=function, is_agent=True)


def _itself(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _environment(spec: Any, field: str, name: str | None) -> NamedEnvironment:
    arguments: dict[str, Any] = {}
    if isinstance(spec, Mapping):
        arguments = dict(spec)
        named = arguments.pop("name", None)
        if named is None:
            remedy = "a mapping needs a name: {name: 'shop.py:Shop', catalog: items.db}; several need a column"
            raise ConfigError(field, spec, remedy)
        made = _class_of(named, field, spec)
    else:
        made = _class_of(spec, field, spec)
    if missing := [method for method in _METHODS if not callable(getattr(_unbound(made), method, None))]:
        remedy = f"{getattr(made, '__name__', made)} has no {missing[0]}(); derive from rlhf_ray.Environment"
        raise ConfigError(field, spec, remedy)
    _check_arguments(made, arguments, field, spec)
    for argument, value in arguments.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{field}.{argument}", value, "must be a finite number")
    found = name if name is not None else _plain_name(getattr(_unbound(made), "__name__", "environment"))
    return NamedEnvironment(name=found, make=functools.partial(made, **arguments), defined_by=made)


def _class_of(named: Any, field: str, value: Any) -> Any:
    if not isinstance(named, str):
        if isinstance(named, (type, functools.partial)):
            return named
        remedy = "must be a class (each episode makes an object of its own), a name, 'module:Class' or 'file.py:Class'"
        raise ConfigError(field, value, remedy)
    if ":" in named:
        found = load_reference(named, field=field, value=value)
        if not isinstance(found, type):
            raise ConfigError(field, value, f"{named} is no class; each episode makes an object of its own")
        return found
    if named not in BUILT_IN:
        known = ", ".join(sorted(BUILT_IN))
        remedy = f"no such environment{nearest(named, BUILT_IN)}; there are {known}, or 'module:Class', 'file.py:Class'"
        raise ConfigError(field, value, remedy)
    return load_reference(BUILT_IN[named], field=field, value=value)


def _check_arguments(made: Any, arguments: Mapping[str, Any], field: str, value: Any) -> None:
    try:
        parameters = inspect.signature(made).parameters
    except (TypeError, ValueError):  # Some classes written in C have no signature.
        return
    takes_any = any(item.kind is item.VAR_KEYWORD for item in parameters.values())
    names = [name for name, item in parameters.items() if item.kind not in (item.VAR_KEYWORD, item.VAR_POSITIONAL)]
    for name in arguments:
        if name not in names and not takes_any:
            known = ", ".join(names) or "none"
            raise ConfigError(field, value, f"no argument {name!r}{nearest(name, names)}; its arguments: {known}")
    given = {*arguments, *bound_arguments(made)}
    missing = [
        name for name, item in parameters.items() if item.default is item.empty and name in names and name not in given
    ]
    if missing:
        raise ConfigError(field, value, f"it needs the argument {missing[0]!r}: {{name: ..., {missing[0]}: ...}}")


def _plain_name(name: str) -> str:
    return re.sub(r"\W+", "_", name).strip("_") or "environment"


def _unbound(made: Any) -> Any:
    """The class or function within any number of ``functools.partial``."""
    while isinstance(made, functools.partial):
        made = made.func
    return made
