"""Functions and classes as tools.

A *source* belongs to a run: it has the schemas of its tools, and travels to the workers. ``open`` makes the tools of
one episode.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import json
import typing
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Protocol, TypeAlias, runtime_checkable

from rlhf_ray.config.user_code import bound_arguments, nearest
from rlhf_ray.environments.environment import Environment
from rlhf_ray.environments.episode import EpisodeFailed
from rlhf_ray.environments.tool_schema import ArgumentCheck, Schema, function_schema, tool_name
from rlhf_ray.errors import ConfigError
from rlhf_ray.pickling import deserialize, serialize

__all__ = ["BadCall", "Handler", "ToolError", "ToolSource", "Tools", "class_tools", "function_tool"]

Handler: TypeAlias = Callable[[dict[str, Any]], Awaitable[str]]
"""Calls a tool with the arguments that the policy wrote, and returns what the policy reads."""

_ROW: Final = "row"


class ToolError(Exception):
    """A tool failed; a tool may also raise it itself, for a message without the name of an exception."""


class BadCall(ToolError):
    """A call that the policy has to write differently; no tool was executed."""


class Tools(Protocol):
    """The tools of a source during one episode."""

    @property
    def handlers(self) -> Mapping[str, Handler]:
        """Name of a tool -> what calls it. It raises :class:`ToolError`, or ``EpisodeFailed`` for the whole episode."""
        ...

    async def close(self) -> None:
        """Free what the tools hold."""
        ...


@runtime_checkable
class ToolSource(Protocol):
    """Where tools come from: a function, a class, or a server. It serves all episodes, and any pickler can copy it."""

    @property
    def schemas(self) -> tuple[Schema, ...]:
        """One per tool, in the form of the OpenAI API and of ``tokenizer.apply_chat_template(tools=...)``."""
        ...

    async def open(self, row: Mapping[str, Any]) -> Tools:
        """Begin an episode of a dataset row; the source itself is not changed."""
        ...


@dataclass(slots=True, kw_only=True)
class _Opened:
    handlers: Mapping[str, Handler]
    instance: Any = None

    async def close(self) -> None:
        if close := getattr(self.instance, "close", None):
            await _call(close)


@dataclass(frozen=True, slots=True, kw_only=True)
class _FunctionTool:
    """A function, the same one for all episodes of a worker."""

    function: Callable[..., Any]
    wants_row: bool
    schemas: tuple[Schema, ...]

    async def open(self, row: Mapping[str, Any]) -> Tools:
        (schema,) = self.schemas
        given = {_ROW: copy.deepcopy(dict(row))} if self.wants_row else {}
        return _Opened(handlers={tool_name(schema): _handler(schema, functools.partial(self.function, **given))})

    def __reduce__(self) -> tuple[Callable[[bytes], object], tuple[bytes]]:
        """Include the code that other processes cannot import, whichever pickler is used."""
        return _from_fields, (serialize((_FunctionTool, _fields(self)), defined_by=self.function),)


@dataclass(frozen=True, slots=True, kw_only=True)
class _ClassTools:
    """A class whose public methods are tools; each episode has an object of its own.

    Calls of a turn are made one after another, in their order: the object is not made for several threads.
    """

    cls: type
    arguments: Mapping[str, Any]
    """Of the constructor, the same objects in all episodes."""
    wants_row: frozenset[str]
    """Names of the methods that have a parameter ``row``."""
    schemas: tuple[Schema, ...]

    async def open(self, row: Mapping[str, Any]) -> Tools:
        own_row = copy.deepcopy(dict(row))
        instance = await _call(self.cls, **self.arguments)
        if reset := getattr(instance, "reset", None):
            answer = await _call(reset, own_row)
            if answer is not None:
                remedy = "the prompt is the row's; derive from Environment to return another one"
                returned = f"{self.cls.__name__}.reset returned {type(answer).__name__}"
                raise EpisodeFailed("wrong_type", f"{returned}: {remedy}")
        lock = asyncio.Lock()
        handlers = {}
        for schema in self.schemas:
            name = tool_name(schema)
            given = {_ROW: own_row} if name in self.wants_row else {}
            handlers[name] = _in_order(lock, _handler(schema, functools.partial(getattr(instance, name), **given)))
        return _Opened(handlers=handlers, instance=instance)

    def __reduce__(self) -> tuple[Callable[[bytes], object], tuple[bytes]]:
        """Include the code that other processes cannot import, whichever pickler is used."""
        return _from_fields, (serialize((_ClassTools, _fields(self)), defined_by=self.cls),)


def function_tool(function: Any, arguments: Mapping[str, Any], *, field: str, value: object) -> ToolSource:
    """A function as a tool, some of whose arguments have a value that the policy does not write.

    Raises:
        ConfigError: It is no function, does not take one of the arguments, or no schema can describe it.
    """
    bound = bound_arguments(function)
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    if not inspect.isroutine(inner):
        forms = "a function, a class, 'module:name', 'file.py:name', {name: ..., <argument>: ...} or {mcp: {...}}"
        raise ConfigError(field, value, f"must be {forms}")
    schema = function_schema(inner, hidden={*bound, *arguments, _ROW}, field=field, value=value)
    parameters = inspect.signature(inner).parameters
    for name in arguments:
        if name not in parameters:
            raise ConfigError(field, value, f"{tool_name(schema)} has no argument {name!r}{nearest(name, parameters)}")
        if name in bound:
            raise ConfigError(field, value, f"{tool_name(schema)} has a value for {name!r} already: leave it out")
    return _FunctionTool(
        function=functools.partial(function, **arguments) if arguments else function,
        wants_row=_ROW in parameters and _ROW not in {*bound, *arguments},
        schemas=(schema,),
    )


def class_tools(cls: type, arguments: Mapping[str, Any], *, field: str, value: object) -> ToolSource:
    """A class as tools, and the arguments of its constructor.

    Raises:
        ConfigError: It cannot be made with them, has no public methods, or no schema can describe one of these.
    """
    if issubclass(cls, Environment):
        raise ConfigError(field, value, f"{cls.__name__} is an environment: .environment({cls.__name__})")
    try:
        inspect.signature(cls).bind(**arguments)
    except (TypeError, ValueError) as error:  # ValueError: a class written in C has no signature.
        remedy = f"{cls.__name__} cannot be made ({error}): write {{name: ..., <argument>: ...}}"
        raise ConfigError(field, value, remedy) from error
    schemas, wants_row = [], set()
    for name, method in inspect.getmembers_static(cls, _is_method):
        if name.startswith("_") or name in ("reset", "close"):
            continue
        parameters = list(inspect.signature(getattr(cls, name)).parameters)
        receiver = set() if isinstance(method, staticmethod | classmethod) else {*parameters[:1]}
        try:
            hidden = {*receiver, _ROW}
            schemas.append(function_schema(getattr(cls, name), hidden=hidden, field=field, value=value))
        except ConfigError as error:
            hint = f"(a method that is no tool is named _{name})"
            raise ConfigError(field, value, f"{cls.__name__}: {error.remedy} {hint}") from error
        if _ROW in parameters:
            wants_row.add(name)
    if not schemas:
        raise ConfigError(field, value, f"{cls.__name__} has no public methods, which would be the tools")
    return _ClassTools(cls=cls, arguments=dict(arguments), wants_row=frozenset(wants_row), schemas=tuple(schemas))


def _is_method(member: object) -> bool:
    return inspect.isfunction(member) or isinstance(member, staticmethod | classmethod)


def _fields(source: Any) -> dict[str, Any]:
    return {field.name: getattr(source, field.name) for field in fields(source)}


def _from_fields(payload: bytes) -> object:
    kind, values = typing.cast("tuple[Any, dict[str, Any]]", deserialize(payload))
    return kind(**values)


def _handler(schema: Schema, function: Callable[..., Any]) -> Handler:
    check = ArgumentCheck(schema)

    async def handler(arguments: dict[str, Any]) -> str:
        if problem := check.problem(arguments):
            raise BadCall(problem)
        return _text(await _call(function, **arguments))

    return handler


def _in_order(lock: asyncio.Lock, handler: Handler) -> Handler:
    async def one_at_a_time(arguments: dict[str, Any]) -> str:
        async with lock:  # Tasks get it in the order in which they asked.
            return await handler(arguments)

    return one_at_a_time


async def _call(function: Callable[..., Any], /, *args: Any, **arguments: Any) -> Any:
    """Call a function, in a thread so that other episodes continue; await what an async one returns.

    Raises:
        ToolError: The function raised.
        EpisodeFailed: The function raised this one.
    """

    def in_thread() -> tuple[Any, BaseException | None]:
        # As values: a thread's future never ends with StopIteration, and SystemExit would end the worker.
        try:
            return function(*args, **arguments), None
        except (Exception, SystemExit) as error:
            return None, error

    inner = function.func if isinstance(function, functools.partial) else function
    is_async = inspect.iscoroutinefunction(inner)
    result, failure = in_thread() if is_async else await asyncio.to_thread(in_thread)
    if failure is None and inspect.isawaitable(result):
        try:
            return await result
        except (Exception, SystemExit) as error:
            failure = error
    if isinstance(failure, ToolError | EpisodeFailed):
        raise failure
    if failure is not None:
        raise ToolError(_described(failure)) from failure
    return result


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _text(result: object) -> str:
    """A string as it is; anything else as JSON, or else as ``str`` writes it.

    Raises:
        ToolError: The result's own ``__str__`` raised.
    """
    if isinstance(result, str):
        return result
    try:
        return json.dumps(result, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):  # No JSON type; keys that are no strings; it contains itself.
        pass
    try:
        return str(result)
    except Exception as error:  # Code of the user's.
        raise ToolError(_described(error)) from error
