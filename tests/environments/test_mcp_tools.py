from __future__ import annotations

import asyncio
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.environments.environment import Action, Step
from rlhf_ray.environments.episode import EpisodeFailed
from rlhf_ray.environments.mcp_tools import close_sessions
from rlhf_ray.environments.tools import ToolEnvironment, resolve_tools, tool_schemas
from rlhf_ray.errors import ConfigError

pytest.importorskip("mcp")

SERVER = Path(__file__).with_name("mcp_server.py")
TIMEOUT_S = 30.0


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, str(SERVER), str(port)], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        server.kill()
        server.wait()


@pytest.fixture(autouse=True)
def no_sessions() -> Iterator[None]:
    yield
    close_sessions()


@pytest.fixture(params=["stdio", "http"])
def spec(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param == "http":
        return {"mcp": {"url": request.getfixturevalue("url"), "timeout_s": TIMEOUT_S}}
    return {"mcp": {"command": [sys.executable, str(SERVER)], "env": {"MARK": "here"}, "timeout_s": TIMEOUT_S}}


def asked(name: str, arguments: object) -> Action:
    message = {"tool_calls": [{"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}]}
    return Action(text="", message=message, token_ids=(1,), truncated=False)


async def play(tools: Any, *actions: Action, on_error: Any = "observe") -> list[Step]:
    environment = ToolEnvironment(tools, on_error=on_error)
    await environment.reset({}, 0)
    try:
        return [await environment.step(action) for action in actions]
    finally:
        await environment.close()


def content(step: Step) -> str:
    assert step.observation is not None
    return step.observation[0]["content"]  # type: ignore[index, no-any-return]


def test_tools_of_a_server(spec: dict[str, Any]) -> None:
    tools = pickle.loads(pickle.dumps(resolve_tools([spec])))

    (add, *others) = tool_schemas(tools)
    assert add["type"] == "function"
    assert add["function"]["name"] == "add"
    assert add["function"]["description"] == "Add two numbers."
    assert add["function"]["parameters"]["required"] == ["a", "b"]
    assert [schema["function"]["name"] for schema in others] == ["count", "complain", "sleep", "die"]

    actions = [asked("add", '{"a": 1, "b": 2}'), asked("complain", "{}"), asked("add", {"a": "x", "b": 2})]
    right, failed, wrong = asyncio.run(play(tools, *actions))
    assert content(right) == "3"
    assert right.metrics == {"tool_calls": 1.0, "tool_errors": 0.0}
    assert content(failed).startswith("error: Error executing tool complain")
    assert failed.metrics["tool_errors"] == 1.0
    assert "valid integer" in content(wrong)
    assert wrong.metrics["tool_errors"] == 1.0
    with pytest.raises(EpisodeFailed, match="the tool complain raised Error executing tool complain"):
        asyncio.run(play(tools, asked("complain", "{}"), on_error="fail"))


def test_episodes_share_a_session_that_outlives_them_and_its_server() -> None:
    command = [sys.executable, str(SERVER)]
    tools = resolve_tools([{"mcp": {"command": command, "env": {"MARK": "here"}, "timeout_s": TIMEOUT_S}}])

    async def episodes() -> list[str]:
        steps = await asyncio.gather(*(play(tools, asked("count", "{}")) for _ in range(3)))
        return sorted(content(step) for (step,) in steps)

    first = asyncio.run(episodes())
    pid = first[0].split()[0]
    assert first == [f"{pid} {number} here" for number in (1, 2, 3)]
    (again,) = asyncio.run(play(tools, asked("count", "{}")))  # Of another event loop.
    assert content(again) == f"{pid} 4 here"

    with pytest.raises(EpisodeFailed, match=r"the server of the tool die is not available: .*Connection closed"):
        asyncio.run(play(tools, asked("die", "{}")))
    (replaced,) = asyncio.run(play(tools, asked("count", "{}")))
    new_pid, *rest = content(replaced).split()
    assert new_pid != pid
    assert rest == ["1", "here"]


def test_a_late_answer_is_an_error_and_leaves_the_session(url: str) -> None:
    tools = resolve_tools([{"mcp": {"url": url, "timeout_s": 1.0}}])
    late, next_one = asyncio.run(play(tools, asked("sleep", {"seconds": 20}), asked("add", {"a": 1, "b": 2})))

    assert content(late) == "error: no answer after 1 s"
    assert content(next_one) == "3"


def test_a_server_that_is_gone_fails_the_episode_and_is_found_again_when_it_returns() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(SERVER), str(port)]
    spec = {"mcp": {"url": f"http://127.0.0.1:{port}/mcp", "timeout_s": TIMEOUT_S}}

    def started() -> subprocess.Popen[bytes]:
        server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return server
            time.sleep(0.1)
        raise TimeoutError

    server = started()
    try:
        tools = resolve_tools([spec])
        asyncio.run(play(tools, asked("count", "{}")))
        server.kill()
        server.wait()
        with pytest.raises(EpisodeFailed, match="the server of the tool count is not available"):
            asyncio.run(play(tools, asked("count", "{}")))
        server = started()
        (step,) = asyncio.run(play(tools, asked("count", "{}")))
        assert content(step).split()[:2] == [str(server.pid), "1"]
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize(
    "spec, remedy",
    [
        ({"mcp": {}}, r"write \{mcp: \{command:"),
        ({"mcp": "server.py"}, r"write \{mcp: \{command:"),
        ({"mcp": {"command": ["x"], "url": "http://x"}}, r"write \{mcp: \{command:"),
        ({"mcp": {"command": ["x"]}, "name": "x"}, r"write \{mcp: \{command:"),
        ({"mcp": {"command": "python server.py"}}, "command must be a list of texts"),
        ({"mcp": {"command": []}}, "command must be a list of texts"),
        ({"mcp": {"command": ["x"], "headers": {}}}, r"mcp has no 'headers' here .known: command, env, timeout_s"),
        ({"mcp": {"command": ["x"], "env": {"A": 1}}}, "env must map names to texts"),
        ({"mcp": {"url": "localhost:8000"}}, "url must begin with http"),
        ({"mcp": {"command": ["x"], "timeout_s": 0}}, "timeout_s must be a positive number"),
        ({"mcp": {"command": ["x"], "timeout_s": True}}, "timeout_s must be a positive number"),
        ({"mcp": {"command": ["no-such-program"]}}, "the server does not answer: no-such-program: FileNotFoundError"),
        ({"mcp": {"command": ["false"]}}, "the server does not answer: false: .*Connection closed"),
        ({"mcp": {"command": ["sleep", "9"], "timeout_s": 0.5}}, "sleep 9: not connected after 0.5 s"),
        (
            {"mcp": {"url": "http://127.0.0.1:9/mcp"}},
            "the server does not answer: http://127.0.0.1:9/mcp: ConnectError",
        ),
    ],
)
def test_wrong_or_silent_servers_are_refused(spec: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy) as caught:
        resolve_tools([spec])

    assert caught.value.field == "environment.tools[0]"
    assert caught.value.value == spec


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mcp", None)

    with pytest.raises(ConfigError, match=r"pip install 'rlhf-ray\[mcp\]'"):
        resolve_tools([{"mcp": {"command": ["server"]}}])
