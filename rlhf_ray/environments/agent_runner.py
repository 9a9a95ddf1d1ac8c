"""How an agent runs: an async function on the worker's event loop, a function in a thread, or a command.

Each gets a copy of the row and reaches the policy through OpenAI's client. For functions the client's transport is the
episode, so that nothing leaves the process.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
import json
import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from rlhf_ray.environments.agent_server import Answerer
from rlhf_ray.environments.bound_process import bound_command
from rlhf_ray.errors import ConfigError
from rlhf_ray.untrusted_text import shortened

if TYPE_CHECKING:
    import httpx2
    import openai

__all__ = ["Agent", "CommandFailed", "Runner", "make_runner"]

Agent: TypeAlias = Callable[..., Any] | Mapping[str, Any]
"""``solve(row, client)``, sync or async, or ``{"command": "python agent.py"}``."""

# The domain does not exist: requests go to the transport, whatever the host.
_BASE_URL = "http://policy.invalid/v1"
_API_KEY = "episode"
_GIVEN = ("client", "base_url", "api_key")
_OUTPUT_TAIL_BYTES = 65_536


class CommandFailed(Exception):
    """A command ended with an error, or printed no reward."""


class Runner(Protocol):
    """An agent in one episode."""

    needs_url: bool
    on_loop: bool
    """Whether all its requests come from the worker's event loop, and none from outside."""

    async def run(self, row: Mapping[str, Any], answer: Answerer, base_url: str) -> Any:
        """Play; what it returns is the reward. Raises what the agent raises."""
        ...

    async def stop(self, timeout_s: float) -> bool:
        """End what cancelling :meth:`run` does not; False if it still runs after the time."""
        ...


def make_runner(agent: Agent) -> Runner:
    """An agent, ready for one episode.

    Args:
        agent: The setting ``environment.agent``.

    Raises:
        ConfigError: It is none of the kinds, a parameter of the function is unknown, or openai is not installed.
    """
    if isinstance(agent, Mapping):
        return CommandRunner(_command(agent))
    if not callable(agent):
        raise ConfigError("environment.agent", agent, 'give a function or {"command": "python agent.py"}')
    _check_openai(agent)
    arguments = _arguments(agent)
    if _is_async(agent):
        return CoroutineRunner(agent, arguments)
    return ThreadRunner(agent, arguments)


# --- functions --------------------------------------------------------------------------------------------------------


class CoroutineRunner:
    """Runs an async function as a task of the worker's event loop."""

    def __init__(self, agent: Callable[..., Any], arguments: Sequence[str]) -> None:
        self.needs_url = "base_url" in arguments
        self.on_loop = not self.needs_url
        self._agent = agent
        self._arguments = arguments

    async def run(self, row: Mapping[str, Any], answer: Answerer, base_url: str) -> Any:
        """See :class:`Runner`."""
        client = _async_client(answer) if {"client", "*client"} & set(self._arguments) else None
        return await _call(self._agent, self._arguments, row, client, base_url)

    async def stop(self, timeout_s: float) -> bool:
        """See :class:`Runner`; a task has nothing more to end."""
        return True


class ThreadRunner:
    """Runs a function in a thread of its own, whose requests wait for the worker's event loop."""

    on_loop = False

    def __init__(self, agent: Callable[..., Any], arguments: Sequence[str]) -> None:
        self.needs_url = "base_url" in arguments
        self._agent = agent
        self._arguments = arguments
        self._bridge: _Bridge | None = None
        self._over: asyncio.Future[tuple[Any, BaseException | None]] | None = None

    async def run(self, row: Mapping[str, Any], answer: Answerer, base_url: str) -> Any:
        """See :class:`Runner`."""
        loop = asyncio.get_running_loop()
        self._bridge = _Bridge(answer, loop)
        over: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()
        self._over = over
        client = _sync_client(self._bridge) if {"client", "*client"} & set(self._arguments) else None

        def work() -> None:
            result: Any = None
            error: BaseException | None = None
            try:
                result = _call(self._agent, self._arguments, row, client, base_url)
            except BaseException as failure:  # What ends a thread must end its episode.
                error = failure
            # The worker may be on its way out, its loop closed.
            if not loop.is_closed():
                loop.call_soon_threadsafe(_set_once, over, (result, error))

        # Threads of an executor would keep the process from ending.
        threading.Thread(target=work, name="agent", daemon=True).start()
        result, error = await asyncio.shield(over)
        if error is not None:
            raise error
        return result

    async def stop(self, timeout_s: float) -> bool:
        """See :class:`Runner`; a pending or later request raises in the thread. Code cannot be stopped elsewhere."""
        if self._bridge is None or self._over is None:
            return True
        self._bridge.close()
        await asyncio.wait({self._over}, timeout=timeout_s)
        return self._over.done()


class _AgentStopped(BaseException):
    """Unwinds an agent's thread; no ``except Exception`` keeps it."""


class _Bridge:
    """Leads requests from threads to an event loop."""

    def __init__(self, answer: Answerer, loop: asyncio.AbstractEventLoop) -> None:
        self._answer = answer
        self._loop = loop
        self._closed = False
        self._pending: set[concurrent.futures.Future[Any]] = set()

    def answer(self, method: str, path: str, body: bytes) -> Any:
        """Wait for an answer.

        Raises:
            _AgentStopped: The episode is over.
        """
        if self._closed:
            raise _AgentStopped
        asked = asyncio.run_coroutine_threadsafe(_awaited(self._answer(method, path, body)), self._loop)
        self._pending.add(asked)
        try:
            # `close` may have run in between.
            if self._closed:
                asked.cancel()
            return asked.result()
        except concurrent.futures.CancelledError:
            raise _AgentStopped from None
        finally:
            self._pending.discard(asked)

    def close(self) -> None:
        """Let pending and later requests raise."""
        self._closed = True
        for asked in tuple(self._pending):
            asked.cancel()


async def _awaited(answer: Awaitable[Any]) -> Any:
    return await answer


def _set_once(over: asyncio.Future[Any], outcome: tuple[Any, BaseException | None]) -> None:
    if not over.done():
        over.set_result(outcome)


def _async_client(answer: Answerer) -> openai.AsyncOpenAI:
    import httpx2
    import openai

    class Transport(httpx2.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            found = await answer(request.method, _path(request), await request.aread())
            return httpx2.Response(found.status, headers={"content-type": found.content_type}, content=found.body)

    http = httpx2.AsyncClient(transport=Transport())
    client = openai.AsyncOpenAI(api_key=_API_KEY, base_url=_BASE_URL, max_retries=0, timeout=None, http_client=http)
    # The name of the operating system, for a header. The client would ask for it in a thread, after which the order of
    # the first parallel requests is random.
    client._platform = "Unknown"
    return client


def _sync_client(bridge: _Bridge) -> openai.OpenAI:
    import httpx2
    import openai

    class Transport(httpx2.BaseTransport):
        def handle_request(self, request: httpx2.Request) -> httpx2.Response:
            found = bridge.answer(request.method, _path(request), request.read())
            return httpx2.Response(found.status, headers={"content-type": found.content_type}, content=found.body)

    http = httpx2.Client(transport=Transport())
    return openai.OpenAI(api_key=_API_KEY, base_url=_BASE_URL, max_retries=0, timeout=None, http_client=http)


def _path(request: httpx2.Request) -> str:
    return request.url.path.removeprefix("/v1")


def _call(agent: Callable[..., Any], arguments: Sequence[str], row: Any, client: Any, base_url: str) -> Any:
    given = {"client": client, "base_url": base_url, "api_key": _API_KEY}
    # The second one may have any name.
    positional = [row, *(given[name.removeprefix("*")] for name in arguments if name.startswith("*"))]
    return agent(*positional, **{name: given[name] for name in arguments if name in given})


def _arguments(agent: Callable[..., Any]) -> list[str]:
    """Which of ``client``, ``base_url`` and ``api_key`` a function takes after the row; ``*client``: by position."""
    parameters = list(inspect.signature(agent).parameters.values())
    kinds = {one.kind for one in parameters}
    named = [one for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    others = named[1:]
    taken = list(_GIVEN) if inspect.Parameter.VAR_KEYWORD in kinds else [p.name for p in others if p.name in _GIVEN]
    unknown = [one for one in others if one.name not in _GIVEN and one.default is one.empty]
    if others and unknown == others[:1] and others[0].kind is not inspect.Parameter.KEYWORD_ONLY:
        return ["*client", *(name for name in taken if name != "client")]
    if not others and inspect.Parameter.VAR_POSITIONAL in kinds:
        return ["*client"]
    if unknown or not {"client", "base_url"} & set(taken):
        found = f"{getattr(agent, '__qualname__', agent)}({', '.join(map(str, parameters))})"
        remedy = "write solve(row, client), or ask for base_url and api_key by these names"
        raise ConfigError("environment.agent", found, remedy)
    return taken


def _is_async(agent: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(agent) or inspect.iscoroutinefunction(getattr(agent, "__call__", None))  # noqa: B004


def _check_openai(agent: Callable[..., Any]) -> None:
    try:
        import httpx2  # noqa: F401
        import openai  # noqa: F401
    except ImportError as failure:
        remedy = f"install OpenAI's client: pip install 'rlhf-ray[agents]' ({failure})"
        raise ConfigError("environment.agent", getattr(agent, "__qualname__", agent), remedy) from failure


# --- commands ---------------------------------------------------------------------------------------------------------


class CommandRunner:
    """Runs a command, which reads the row as JSON and prints the reward as its last line; it ends with this process."""

    needs_url = True
    on_loop = False

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._name = shortened(shlex.join(command), 200)

    async def run(self, row: Mapping[str, Any], answer: Answerer, base_url: str) -> Any:
        """See :class:`Runner`.

        Raises:
            CommandFailed: It ended with an error, or cannot be started.
            TypeError: The row is no JSON.
            FileNotFoundError: There is no such program.
        """
        pipe = asyncio.subprocess.PIPE
        given = json.dumps(dict(row), default=_plain).encode()
        env = _environment(base_url)
        if shutil.which(self._command[0], path=env["PATH"]) is None:
            raise FileNotFoundError(self._command[0])
        command = bound_command(self._command)
        process = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, stderr=pipe, env=env, start_new_session=True
        )
        assert process.stdin and process.stdout and process.stderr
        try:
            _, output, errors = await asyncio.gather(
                _feed(process.stdin, given), _tail(process.stdout), _tail(process.stderr)
            )
            status = await process.wait()
        finally:
            _kill(process.pid)
            await process.wait()
        if status:
            how = f"was killed by signal {-status}" if status < 0 else f"ended with exit status {status}"
            raise CommandFailed(f"{self._name} {how}: {_last(errors) or 'no output on stderr'}")
        return self._reward(output)

    async def stop(self, timeout_s: float) -> bool:
        """See :class:`Runner`; cancelling :meth:`run` kills the command and what it started."""
        return True

    def _reward(self, output: bytes) -> float | str | None:
        line = _last(output)
        try:
            return float(line) if line else None
        except ValueError:
            return line


def _command(agent: Mapping[str, Any]) -> list[str]:
    command = agent.get("command")
    parts = shlex.split(command) if isinstance(command, str) else command
    if set(agent) != {"command"} or not isinstance(parts, (list, tuple)) or not parts:
        raise ConfigError("environment.agent", agent, 'write {"command": "python agent.py"} or a list of texts')
    if not all(isinstance(part, str) for part in parts):
        raise ConfigError("environment.agent", agent, "every part of the command must be a text")
    return list(parts)


def _environment(base_url: str) -> dict[str, str]:
    """The worker's, so that ``python`` is the worker's own and no proxy stands between it and its agents."""
    hosts = [os.environ[name] for name in ("NO_PROXY", "no_proxy") if os.environ.get(name)]
    no_proxy = ",".join([*hosts[:1], "127.0.0.1"])
    path = os.pathsep.join(filter(None, [str(Path(sys.executable).parent), os.environ.get("PATH")]))
    own = {"OPENAI_BASE_URL": base_url, "OPENAI_API_KEY": _API_KEY, "NO_PROXY": no_proxy, "no_proxy": no_proxy}
    return {**os.environ, **own, "PATH": path}


def _plain(value: Any) -> Any:
    """Arrays and numbers of numpy as JSON takes them."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(
        f"a column holds {type(value).__name__}, which is no JSON: drop it, or write the agent as a function"
    )


async def _feed(stdin: asyncio.StreamWriter, given: bytes) -> None:
    # A command need not read its input.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        stdin.write(given)
        await stdin.drain()
        stdin.close()


async def _tail(stream: asyncio.StreamReader) -> bytes:
    """The end of an output of any length."""
    tail = b""
    while read := await stream.read(_OUTPUT_TAIL_BYTES):
        tail = (tail + read)[-_OUTPUT_TAIL_BYTES:]
    return tail


def _last(output: bytes) -> str:
    lines: Iterable[str] = output.decode(errors="replace").strip().splitlines()
    return shortened(next(reversed(list(lines)), ""), 300)


def _kill(process_group: int) -> None:
    # The group is gone if all of it has ended.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process_group, signal.SIGKILL)
