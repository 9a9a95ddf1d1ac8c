"""Tools that the policy calls, and the environment that executes the calls.

::

    sources = resolve_tools([calculator, "shop.py:Shop", {"mcp": {"url": ...}}])   driver: checks, schemas
    tool_schemas(sources)                                                          what chat templates render
    ToolEnvironment(sources)                                                       worker: one per episode
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeAlias

from rlhf_ray.config.user_code import load_reference
from rlhf_ray.environments.environment import Action, Environment, Step
from rlhf_ray.environments.episode import EpisodeFailed
from rlhf_ray.environments.tool_schema import Schema, tool_name
from rlhf_ray.environments.tool_sources import (
    BadCall,
    Handler,
    ToolError,
    Tools,
    ToolSource,
    class_tools,
    function_tool,
)
from rlhf_ray.errors import ConfigError
from rlhf_ray.untrusted_text import shortened

__all__ = ["ToolEnvironment", "ToolError", "ToolSource", "ToolSpec", "resolve_tools", "tool_schemas"]

ToolSpec: TypeAlias = Callable[..., Any] | str | Mapping[str, Any] | ToolSource
"""A function or class; ``module:name`` or ``file.py:name`` of one; one with arguments that the policy does not write,
``{name: ..., <argument>: ...}``; or a server, ``{mcp: {...}}``."""


def tool_schemas(tools: Sequence[ToolSpec]) -> list[Schema]:
    """The schemas of all tools, in order, for chat templates.

    Raises:
        ConfigError: As :func:`resolve_tools`.
    """
    return [schema for source in resolve_tools(tools) for schema in source.schemas]


def resolve_tools(tools: Sequence[ToolSpec]) -> tuple[ToolSource, ...]:
    """Find the tools and make their schemas; what is resolved already stays as it is.

    Raises:
        ConfigError: A tool is missing, has no docstring or types, or has parameters that no schema can describe; two
            have the same name; or a server of tools does not answer.
    """
    if isinstance(tools, str) or not isinstance(tools, Sequence):
        raise ConfigError("environment.tools", tools, "must be a list, of a single tool too: [calculator]")
    sources: list[ToolSource] = []
    first: dict[str, str] = {}
    for index, spec in enumerate(tools):
        field = f"environment.tools[{index}]"
        sources.append(_resolve(spec, field))
        for name in map(tool_name, sources[-1].schemas):
            if name in first:
                raise ConfigError(field, spec, f"{first[name]} has a tool {name!r} already: rename one of them")
            first[name] = field
    return tuple(sources)


def _resolve(spec: ToolSpec, field: str) -> ToolSource:
    if isinstance(spec, ToolSource) and not isinstance(spec, type):
        return spec
    named: object = spec
    arguments: dict[str, Any] = {}
    if isinstance(spec, Mapping):
        if "mcp" in spec:
            from rlhf_ray.environments.mcp_tools import mcp_tools

            return mcp_tools(spec, field=field)
        arguments = dict(spec)
        named = arguments.pop("name", None)
    if isinstance(named, str):
        named = load_reference(named, field=field, value=spec)
    if isinstance(named, type):
        return class_tools(named, arguments, field=field, value=spec)
    return function_tool(named, arguments, field=field, value=spec)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    text: str
    is_error: bool = False


class ToolEnvironment(Environment):
    """Executes the tool calls of each turn, until a turn has none.

    The first prompt is the row's own. The calls of a turn run concurrently, and the results are messages of role
    ``tool`` in the order of the calls. A call of an unknown tool, or with arguments that do not fit its schema, is
    answered with an error text. A turn that a length limit cut ends the episode, and its calls are not executed.
    Metrics of each step: ``tool_calls`` and ``tool_errors``.

    Args:
        tools: What :func:`resolve_tools` takes or returns. A tool with a parameter ``row`` gets a copy of the row.
        on_error: ``observe``: the policy reads the error of a tool that raises. ``fail``: the episode is a counted
            failure.
        max_result_chars: The part of a longer result that the policy reads; a note says how much is missing.

    Raises:
        ConfigError: As :func:`resolve_tools`, or another argument is out of range.
    """

    def __init__(
        self,
        tools: Sequence[ToolSpec],
        *,
        on_error: Literal["observe", "fail"] = "observe",
        max_result_chars: int = 20_000,
    ) -> None:
        if on_error not in ("observe", "fail"):
            raise ConfigError("environment.on_error", on_error, "must be 'observe' or 'fail'")
        if type(max_result_chars) is not int or max_result_chars < 1:
            raise ConfigError("environment.max_result_chars", max_result_chars, "must be a positive integer")
        self.sources = resolve_tools(tools)
        self._fail_on_error = on_error == "fail"
        self._max_result_chars = max_result_chars
        self._opened: list[Tools] = []
        self._handlers: dict[str, Handler] = {}

    async def reset(self, row: Mapping[str, Any], seed: int) -> None:  # type: ignore[override]
        """Begin an episode, with a new object of each class among the tools.

        Raises:
            EpisodeFailed: A class or its ``reset`` raised.
        """
        for source in self.sources:
            try:
                opened = await source.open(row)
            except ToolError as error:
                names = ", ".join(map(tool_name, source.schemas))
                raise EpisodeFailed("raised", f"the tools {names} could not be made: {shortened(error)}") from error
            self._opened.append(opened)
            self._handlers.update(opened.handlers)

    async def step(self, action: Action) -> Step:  # type: ignore[override]
        """Execute the calls of a turn.

        Raises:
            EpisodeFailed: A tool raised and ``on_error`` is ``fail``, or a server of tools is not available.
        """
        calls = action.message.get("tool_calls") or []
        if action.truncated or not calls:
            nothing = {"tool_calls": 0.0, "tool_errors": 0.0}
            return Step(done=not action.truncated, truncated=action.truncated, metrics=nothing)
        # Failures as values: the other calls of the turn end before the episode does.
        outcomes = await asyncio.gather(*(self._outcome(call) for call in calls), return_exceptions=True)
        observation, num_errors = [], 0
        for call, outcome in zip(calls, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                raise outcome
            num_errors += outcome.is_error
            name, content = _function(call).get("name"), self._cut(outcome.text)
            observation.append({"role": "tool", "tool_call_id": call.get("id"), "name": name, "content": content})
        metrics = {"tool_calls": float(len(calls)), "tool_errors": float(num_errors)}
        return Step(observation=observation, metrics=metrics)

    async def close(self) -> None:  # type: ignore[override]
        """End the episode: call ``close`` of the objects that have one.

        Raises:
            EpisodeFailed: One of them raised.
        """
        opened, self._opened, self._handlers = self._opened, [], {}
        for failure in await asyncio.gather(*(tools.close() for tools in opened), return_exceptions=True):
            if isinstance(failure, ToolError):
                raise EpisodeFailed("raised", f"a tool could not be closed: {shortened(failure)}") from failure
            if isinstance(failure, BaseException):
                raise failure

    async def _outcome(self, call: Mapping[str, Any]) -> _Outcome:
        name = str(_function(call).get("name"))
        try:
            if name not in self._handlers:
                known = ", ".join(self._handlers)
                raise BadCall(f"there is no tool {shortened(name, 80)!r}; there are: {known}")
            arguments = _arguments(name, _function(call).get("arguments"))
            return _Outcome(text=await self._handlers[name](arguments))
        except ToolError as error:
            if self._fail_on_error and not isinstance(error, BadCall):
                raise EpisodeFailed("raised", f"the tool {name} raised {shortened(error)}") from error
            return _Outcome(text=f"error: {error}", is_error=True)

    def _cut(self, text: str) -> str:
        # Tokenizers refuse lone surrogates, which UTF-8 cannot encode.
        text = text.encode("utf-8", "replace").decode("utf-8")
        num_cut = len(text) - self._max_result_chars
        return text if num_cut <= 0 else f"{text[: self._max_result_chars]}\n[{num_cut} more characters were cut]"


def _function(call: Mapping[str, Any]) -> Mapping[str, Any]:
    return call.get("function") or {}


def _arguments(name: str, written: object) -> dict[str, Any]:
    """The arguments of a call: an object, or its JSON text; nothing at all stands for none.

    Raises:
        BadCall: It is something else.
    """
    if written is None or (isinstance(written, str) and not written.strip()):
        return {}
    if isinstance(written, str):
        try:
            written = json.loads(written, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:  # RecursionError: thousands of nested lists.
            raise BadCall(f"the arguments of {name} are no JSON: {shortened(error, 200)}") from error
    if not isinstance(written, Mapping):
        raise BadCall(f"the arguments of {name} must be a JSON object, not {type(written).__name__}")
    return dict(written)


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON value")
