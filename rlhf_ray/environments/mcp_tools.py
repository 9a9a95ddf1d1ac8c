"""Servers of the Model Context Protocol (MCP) as tools: programs that speak it on stdin and stdout, and URLs.

A worker process has one session per server, which all its episodes share. Sessions run in an event loop of their own in
a background thread, each in one task, because the contexts of ``mcp`` must be left by the task that entered them. A
server that is a program ends with its worker, also with one that is killed.
"""

from __future__ import annotations

import asyncio
import functools
import json
import shutil
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from rlhf_ray.environments.bound_process import bound_command
from rlhf_ray.environments.episode import EpisodeFailed
from rlhf_ray.environments.tool_schema import Schema, tool_name
from rlhf_ray.environments.tool_sources import Handler, ToolError, Tools, ToolSource
from rlhf_ray.errors import ConfigError
from rlhf_ray.untrusted_text import shortened

if TYPE_CHECKING:
    from mcp import Client
    from mcp.types import CallToolResult

__all__ = ["close_sessions", "mcp_tools"]

T = TypeVar("T")

_FORMS = "write {mcp: {command: [program, argument], env: {}}} or {mcp: {url: 'http://host/mcp', headers: {}}}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Server:
    """How to reach a server; equal ones share a session."""

    command: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    """In addition to a few variables such as ``PATH`` and ``HOME``."""
    url: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    timeout_s: float = 60.0
    """For connecting, and for each call."""

    def __str__(self) -> str:
        return self.url or " ".join(self.command)


def mcp_tools(spec: Mapping[str, Any], *, field: str) -> ToolSource:
    """The tools of a server: connects, lists them, and disconnects.

    Args:
        spec: ``{mcp: {command: [...], env: {...}}}`` or ``{mcp: {url: ..., headers: {...}}}``, also with ``timeout_s``.
        field: The setting that has it, for the error.

    Raises:
        ConfigError: The specification is wrong, the package ``mcp`` is not installed, the server does not answer, or it
            has no tools.
    """
    server = _server(spec, field)
    try:
        import mcp
    except ModuleNotFoundError as error:
        raise ConfigError(field, spec, "the package mcp is not installed: pip install 'rlhf-ray[mcp]'") from error
    try:
        schemas = asyncio.run_coroutine_threadsafe(_list_tools(server), _loop()).result()
    except (_Lost, mcp.MCPError) as error:
        raise ConfigError(field, spec, f"the server does not answer: {error}") from error
    if not schemas:
        raise ConfigError(field, spec, "the server has no tools")
    return _MCPTools(server=server, schemas=schemas)


def close_sessions() -> None:
    """Disconnect from all servers, before a worker process ends; later calls connect again."""

    async def close() -> None:
        sessions = list(_sessions.values())
        _sessions.clear()
        await asyncio.gather(*(session.end() for session in sessions))

    asyncio.run_coroutine_threadsafe(close(), _loop()).result()


def _server(spec: Mapping[str, Any], field: str) -> _Server:
    given = spec["mcp"]
    if len(spec) > 1 or not isinstance(given, Mapping) or ("command" in given) == ("url" in given):
        raise ConfigError(field, spec, _FORMS)
    known = {"timeout_s", *(("command", "env") if "command" in given else ("url", "headers"))}
    for name in given:
        if name not in known:
            raise ConfigError(field, spec, f"mcp has no {name!r} here (known: {', '.join(sorted(known))}); {_FORMS}")
    command, timeout_s = given.get("command", ["-"]), given.get("timeout_s", 60.0)
    if not isinstance(command, list | tuple) or not command or not all(isinstance(part, str) for part in command):
        raise ConfigError(field, spec, "command must be a list of texts, the program first: ['python', 'server.py']")
    if "url" in given and not str(given["url"]).startswith(("http://", "https://")):
        raise ConfigError(field, spec, "url must begin with http:// or https://")
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 < timeout_s < float("inf"):
        raise ConfigError(field, spec, "timeout_s must be a positive number of seconds")
    pairs = {}
    for name in ("env", "headers"):
        values = given.get(name) or {}
        if not isinstance(values, Mapping) or not all(isinstance(value, str) for value in values.values()):
            raise ConfigError(field, spec, f"{name} must map names to texts: {{NAME: 'value'}}")
        pairs[name] = tuple(sorted(values.items()))
    if "url" in given:
        return _Server(url=given["url"], headers=pairs["headers"], timeout_s=timeout_s)
    return _Server(command=tuple(command), env=pairs["env"], timeout_s=timeout_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class _MCPTools:
    server: _Server
    schemas: tuple[Schema, ...]

    async def open(self, row: Mapping[str, Any]) -> Tools:
        return _Shared(handlers={name: self._handler(name) for name in map(tool_name, self.schemas)})

    def _handler(self, name: str) -> Handler:
        async def handler(arguments: dict[str, Any]) -> str:
            return await _in_loop(_call_tool(self.server, name, arguments))

        return handler


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shared:
    handlers: Mapping[str, Handler]

    async def close(self) -> None:
        """The session outlives the episode."""


# ---- What runs in the thread of the sessions ----

_sessions: dict[_Server, _Session] = {}


class _Lost(Exception):
    """There is no connection, or it ended before the answer came."""


class _Session:
    """A connection to a server."""

    def __init__(self, server: _Server) -> None:
        self._server = server
        self._connected: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
        self._ending = asyncio.Event()
        self._error: BaseException | None = None
        self._task = asyncio.create_task(self._run())

    @property
    def ended(self) -> bool:
        """Whether it is of no use any more."""
        return self._task.done() or self._ending.is_set()

    async def use(self, request: Callable[[Client], Awaitable[T]]) -> T:
        """Make a request, once connected.

        Raises:
            _Lost: There is no connection, or it ended before the answer came; another session is needed.
            MCPError: The server refused the request, or did not answer in time.
        """
        from mcp import MCPError
        from mcp.types import CONNECTION_CLOSED

        await self._wait_for(self._connected, timeout_s=self._server.timeout_s)
        asked = asyncio.ensure_future(request(self._connected.result()))
        try:
            await self._wait_for(asked)
            return asked.result()
        except MCPError as error:
            if error.code == CONNECTION_CLOSED or error.message == "Session terminated":
                self._ending.set()
                raise _Lost(f"{self._server}: {error.message}") from error
            raise
        finally:
            asked.cancel()

    async def end(self) -> None:
        """Disconnect, and end a server that is a program."""
        self._ending.set()
        await asyncio.wait({self._task}, timeout=self._server.timeout_s)

    async def _wait_for(self, future: asyncio.Future[Any], timeout_s: float | None = None) -> None:
        await asyncio.wait({future, self._task}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if future.done():
            return
        if not self._task.done():
            self._ending.set()
            self._task.cancel()
            raise _Lost(f"{self._server}: not connected after {timeout_s:g} s")
        raise _Lost(shortened(f"{self._server}: {_cause(self._error)}"))

    async def _run(self) -> None:
        try:
            async with _connect(self._server) as client:
                self._connected.set_result(client)
                await self._ending.wait()
        except Exception as error:  # Whatever ends the connection is what its requests report.
            self._error = error


def _cause(error: BaseException | None) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}" if error else "the connection ended"


@asynccontextmanager
async def _connect(server: _Server) -> AsyncIterator[Client]:
    import httpx2
    from mcp import Client, StdioServerParameters, stdio_client
    from mcp.client.streamable_http import streamable_http_client

    if not server.url:
        env = dict(server.env)
        if shutil.which(server.command[0], path=env.get("PATH")) is None:
            raise FileNotFoundError(server.command[0])
        program, *arguments = bound_command(server.command)
        stdio = stdio_client(StdioServerParameters(command=program, args=arguments, env=env))
        async with Client(stdio, read_timeout_seconds=server.timeout_s) as client:
            yield client
        return
    # Answers are waited for in the request, whose time limit does not end the session.
    limits = httpx2.Timeout(server.timeout_s, read=None)
    async with httpx2.AsyncClient(headers=dict(server.headers), timeout=limits) as http:
        transport = streamable_http_client(server.url, http_client=http)
        async with Client(transport, read_timeout_seconds=server.timeout_s) as client:
            yield client


async def _list_tools(server: _Server) -> tuple[Schema, ...]:
    session = _Session(server)
    try:
        return await session.use(_all_schemas)
    finally:
        await session.end()


async def _all_schemas(client: Client) -> tuple[Schema, ...]:
    schemas: list[Schema] = []
    cursor: str | None = None
    while True:
        page = await client.list_tools(cursor=cursor)
        for tool in page.tools:
            described = {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}
            schemas.append({"type": "function", "function": described})
        cursor = page.next_cursor
        if cursor is None:
            return tuple(schemas)


async def _call_tool(server: _Server, name: str, arguments: dict[str, Any]) -> str:
    from mcp import MCPError
    from mcp.types import REQUEST_TIMEOUT

    session = _sessions.get(server)
    if session is None or session.ended:
        session = _sessions[server] = _Session(server)
    try:
        result = await session.use(lambda client: client.call_tool(name, arguments))
    except _Lost as error:
        # The call may have been executed: it is not repeated. The next one connects again.
        raise EpisodeFailed("raised", f"the server of the tool {name} is not available: {error}") from error
    except MCPError as error:
        late = f"no answer after {server.timeout_s:g} s"
        raise ToolError(late if error.code == REQUEST_TIMEOUT else error.message) from error
    except Exception as error:  # The answer does not have the form that the protocol or the tool's schema demand.
        raise ToolError(f"{type(error).__name__}: {shortened(error)}") from error
    text = _text(result)
    if result.is_error:
        raise ToolError(text)
    return text


def _text(result: CallToolResult) -> str:
    """The texts of a result; for other content, what it is."""
    parts = []
    for item in result.content:
        resource = getattr(item, "resource", None)
        parts.append(getattr(resource or item, "text", None) or f"[{item.type}]")
    if not parts and result.structured_content is not None:
        return json.dumps(result.structured_content, ensure_ascii=False)
    return "\n".join(parts)


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="mcp sessions", daemon=True).start()
    return loop


async def _in_loop(work: Coroutine[Any, Any, T]) -> T:
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, _loop()))
