"""What environment workers, real actors, leave behind when they end."""

from __future__ import annotations

import asyncio
import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from environments.test_play import TOKENIZER, sampled_of, start_of

from rlhf_ray.config.settings import EnvironmentSettings
from rlhf_ray.environments.environment import Environment, Step
from rlhf_ray.environments.pool import EnvironmentPool, PoolSettings
from rlhf_ray.environments.registry import NamedEnvironment, resolve_environments
from rlhf_ray.environments.worker import WorkerSettings
from rlhf_ray.pickling import serialize

pytestmark = pytest.mark.usefixtures("cluster")

SERVER = Path(__file__).parents[1] / "environments" / "mcp_server.py"
GONE_S = 20.0


def pool_of(environment: NamedEnvironment) -> EnvironmentPool:
    worker = WorkerSettings(
        environments=(environment.serialized(),),
        tokenizer=serialize(TOKENIZER, defined_by=TOKENIZER),
        trust_remote_code=False,
        chat_template=None,
    )
    return EnvironmentPool(
        PoolSettings(
            worker=worker,
            deterministic=frozenset(),
            num_workers=2,
            num_cpus=0.1,
            step_timeout_s=30.0,
            startup_timeout_s=60.0,
        )
    )


class Sandbox(Environment):
    """Says when it is closed."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def reset(self, row: Any, seed: int) -> None:
        """Say that it is open."""
        self._file = Path(self._folder, str(id(self)) + str(os.getpid()))
        self._file.write_text("open")

    def step(self, action: Any) -> Step:
        """Go on for ever."""
        return Step(observation="?")

    def close(self) -> None:
        """Say so."""
        self._file.write_text("closed")


def test_environments_that_are_open_are_closed_when_the_run_ends(tmp_path: Path) -> None:
    settings = EnvironmentSettings(name={"name": Sandbox, "folder": str(tmp_path)})
    (environment,) = resolve_environments(settings)
    pool = pool_of(environment)
    pool.start()

    async def begin() -> None:
        for _ in range(4):
            await pool.play(replace(start_of(), environment="Sandbox")).begin()

    asyncio.run(begin())
    assert [file.read_text() for file in tmp_path.iterdir()] == ["open"] * 4
    pool.stop()
    assert [file.read_text() for file in tmp_path.iterdir()] == ["closed"] * 4


def servers() -> list[psutil.Process]:
    """Those of the tests, and the processes that watch over them."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(SERVER) in process.cmdline():
                found.append(process)
        except psutil.Error:
            continue
    return found


@functools.cache
def tools() -> NamedEnvironment:
    server = {"command": [sys.executable, str(SERVER)], "env": {"STAY": "1"}}
    (environment,) = resolve_environments(EnvironmentSettings(tools=[{"mcp": server}], tool_parser="hermes"))
    return environment


def called_a_tool() -> EnvironmentPool:
    """Workers, one of which has had its server answer."""
    pool = pool_of(tools())
    pool.start()
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}

    async def play() -> None:
        played = pool.play(replace(start_of([{"role": "user", "content": "1+2"}]), environment="tools"))
        await played.begin()
        reply = await played.step(sampled_of("", message={"role": "assistant", "content": "", "tool_calls": [call]}))
        assert reply.requests[0].messages[0]["content"] == "3"

    asyncio.run(play())
    return pool


def stay(address: str) -> None:
    """A driver that has called a tool and does not end by itself."""
    ray.init(address=address, namespace="rlhf_ray", log_to_driver=False)
    called_a_tool()
    print("ready", flush=True)
    time.sleep(600)


def assert_no_servers() -> None:
    deadline = time.monotonic() + GONE_S
    while servers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert servers() == []


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_servers_of_tools_end_with_their_worker(how: str, processes: Callable[[str], list[psutil.Process]]) -> None:
    pytest.importorskip("mcp")
    pool = called_a_tool()
    assert servers()
    if how == "killed":
        for process in processes("ray::EnvironmentWorker"):
            process.kill()
    else:
        pool.stop()
    assert_no_servers()
    pool.stop()


def test_servers_of_tools_end_with_a_driver_that_is_killed() -> None:
    pytest.importorskip("mcp")
    command = f"from integration.test_environment_workers import stay; stay({ray.get_runtime_context().gcs_address!r})"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SERVER.parents[1]), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen([sys.executable, "-c", command], env=env, stdout=subprocess.PIPE) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == b"ready\n"
        assert servers()
        driver.kill()
    assert_no_servers()
