"""A server on this machine's loopback address, for agents that insist on a URL."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, TypeAlias

from rlhf_ray.environments.openai_api import Answer, Refused

if TYPE_CHECKING:
    from starlette.requests import Request as HTTPRequest
    from starlette.responses import Response as HTTPResponse

__all__ = ["AgentServer", "Answerer"]

Answerer: TypeAlias = Callable[[str, str, bytes], Awaitable[Answer]]
"""Takes the method, the path below the base URL, and the body of a request."""

# Agents think and use tools between requests; a client that reuses a connection that was just closed fails.
_KEEP_ALIVE_S = 3600


class AgentServer:
    """Leads each request to its episode, whose secret is part of the URL. One per process is enough.

    Example:
        ::

            server = AgentServer()
            base_url = await server.add(episode.answer)
            ...
            server.remove(base_url)
            await server.stop()
    """

    def __init__(self) -> None:
        self._answerers: dict[str, Answerer] = {}
        self._port: int | None = None
        self._starting = asyncio.Lock()
        self._stop: Callable[[], Awaitable[None]] | None = None

    async def add(self, answerer: Answerer) -> str:
        """Serve an episode; starts the server with the first one.

        Returns:
            The base URL, as ``OPENAI_BASE_URL`` has it.

        Raises:
            OSError: No port is free.
        """
        async with self._starting:
            if self._port is None:
                self._port = await self._start()
        secret = secrets.token_urlsafe(16)
        self._answerers[secret] = answerer
        return f"http://127.0.0.1:{self._port}/{secret}/v1"

    def remove(self, base_url: str) -> None:
        """Refuse further requests."""
        self._answerers.pop(base_url.rsplit("/", 2)[1], None)

    async def stop(self) -> None:
        """Close the port and all connections."""
        if self._stop is not None:
            await self._stop()
            self._port = self._stop = None

    async def _start(self) -> int:
        import uvicorn
        from starlette.applications import Starlette
        from starlette.routing import Route

        class Server(uvicorn.Server):
            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:
                """Leave the process's signal handlers alone."""
                yield

        app = Starlette(routes=[Route("/{secret}/v1/{path:path}", self._respond, methods=["GET", "POST"])])
        listening = socket.create_server(("127.0.0.1", 0), backlog=2048)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=1,
        )
        server = Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listening]))

        async def stop() -> None:
            server.should_exit = True
            await serving
            listening.close()

        self._stop = stop
        return int(listening.getsockname()[1])

    async def _respond(self, request: HTTPRequest) -> HTTPResponse:
        from starlette.responses import Response

        secret = request.path_params["secret"]
        answer = Refused("there is no such episode, or it is over", status=404).answer
        if answerer := self._answerers.get(secret):
            try:
                answer = await answerer(request.method, "/" + request.path_params["path"], await request.body())
            except asyncio.CancelledError:
                # The end of an episode cancels what it has not answered; the end of the server does too.
                if secret in self._answerers:
                    raise
        return Response(answer.body, status_code=answer.status, headers={"content-type": answer.content_type})
