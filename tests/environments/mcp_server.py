"""An MCP server for tests: on stdin and stdout, or, with a port as its argument, over HTTP.

With ``STAY`` in its environment neither the end of its input nor SIGTERM ends it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time

from mcp.server import MCPServer

app = MCPServer("test")
calls = 0


@app.tool()
def add(a: int, b: int) -> str:
    """Add two numbers."""
    return f"{a + b}"


@app.tool()
def count() -> str:
    """Count the calls to this process."""
    global calls
    calls += 1
    return f"{os.getpid()} {calls} {os.environ.get('MARK', '')}"


@app.tool()
def complain() -> str:
    """Raise."""
    raise ValueError("bad luck")


@app.tool()
async def sleep(seconds: float) -> str:
    """Answer late."""
    await asyncio.sleep(seconds)
    return "awake"


@app.tool()
def die() -> str:
    """End the process."""
    os._exit(1)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        app.run(transport="streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
    else:
        stays = bool(os.environ.get("STAY"))
        if stays:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        app.run()
        while stays:
            time.sleep(600)
