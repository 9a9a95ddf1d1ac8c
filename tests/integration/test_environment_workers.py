"""What environment workers, real actors, leave behind when they end."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from environments.test_play import TOKENIZER, sampled_of, start_of

from rlhf_ray.config.settings import EnvironmentSettings
from rlhf_ray.environments.environment import Environment, Step
from rlhf_ray.environments.pool import EnvironmentPool, PoolSettings
from rlhf_ray.environments.registry import NamedEnvironment, resolve_environments
from rlhf_ray.environments.worker import WorkerSettings
from rlhf_ray.pickling import serialize

pytestmark = pytest.mark.usefixtures("cluster")

SERVER = Path(__file__).parents[1] / "environments" / "mcp_server.py"
GONE_S = 10.0


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
    found = []
    for process in psutil.process_iter():
        try:
            if str(SERVER) in process.cmdline():
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_servers_of_tools_end_with_their_worker(how: str, processes: Callable[[str], list[psutil.Process]]) -> None:
    pytest.importorskip("mcp")
    settings = EnvironmentSettings(tools=[{"mcp": {"command": [sys.executable, str(SERVER)]}}], tool_parser="hermes")
    (environment,) = resolve_environments(settings)
    pool = pool_of(environment)
    pool.start()
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}

    async def play() -> None:
        played = pool.play(replace(start_of([{"role": "user", "content": "1+2"}]), environment="tools"))
        await played.begin()
        reply = await played.step(sampled_of("", message={"role": "assistant", "content": "", "tool_calls": [call]}))
        assert reply.requests[0].messages[0]["content"] == "3"

    asyncio.run(play())
    assert len(servers()) == 1
    if how == "killed":
        for process in processes("ray::EnvironmentWorker"):
            process.kill()
    else:
        pool.stop()
    deadline = time.monotonic() + GONE_S
    while servers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert servers() == []
    pool.stop()
