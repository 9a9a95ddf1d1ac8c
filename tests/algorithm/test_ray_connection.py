"""One connection for all sessions of a process, and what is said where there is none. Without Ray."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray._private import auto_init_hook

from rlhf_ray.algorithm import ray_connection as module
from rlhf_ray.algorithm.ray_connection import RayConnection, _below, _end, cluster_to_join, connect, processes_of_ray
from rlhf_ray.errors import ConfigError


def start_raylet(folder: Path, program: str = "read line") -> subprocess.Popen[bytes]:
    """A shell program in a process that is called like Ray's; by default it ends with its input."""
    folder.mkdir(exist_ok=True)
    raylet = folder / "raylet"
    raylet.symlink_to("/bin/sh")
    return subprocess.Popen([str(raylet), "-c", program], stdin=subprocess.PIPE)


def test_the_workers_of_a_cluster_are_all_below_its_raylet(tmp_path: Path) -> None:
    other = subprocess.Popen(["sleep", "60"])
    cluster = start_raylet(tmp_path, "sleep 60 & sh -c 'sleep 60; true' & wait")
    try:
        deadline, names = time.perf_counter() + 5, ["sh", "sleep", "sleep"]
        # Until it has become what it runs a new process has the name of its parent.
        while sorted(each.name() for each in _below(processes_of_ray("raylet"))) != names:
            assert time.perf_counter() < deadline
            time.sleep(0.01)
        found = _below(processes_of_ray("raylet"))
        _end(found, grace_s=0.1)
        assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in found)
        assert other.poll() is None
    finally:
        for process in (cluster, other):
            process.kill()
            process.communicate()


def test_processes_that_end_by_themselves_are_waited_for_and_not_killed() -> None:
    quick = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.2)"])
    process = psutil.Process(quick.pid)

    _end([process], grace_s=5.0)

    assert quick.wait() == 0


RECORDED = "10.0.0.9:6379"


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a process to which no cluster is known; what a test sets is gone afterward."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    variables["RAY_TMPDIR"] = str(tmp_path)
    monkeypatch.setattr("os.environ", variables)
    return variables


@pytest.fixture
def record(tmp_path: Path, environment: dict[str, str]) -> Path:
    """What ``ray start`` leaves: the address of its cluster."""
    path = tmp_path / "ray" / "ray_current_cluster"
    path.parent.mkdir()
    path.write_text(RECORDED)
    return path


@pytest.mark.parametrize(
    ("address", "variable", "joined"),
    [
        (None, None, RECORDED),
        (None, "", RECORDED),
        ("auto", None, "auto"),
        ("auto", "head:6379", "head:6379"),
        (None, "head:6379", "head:6379"),
        (None, "local", None),
        ("local", None, None),
        ("local", "head:6379", None),
        ("10.0.0.1:6379", "head:6379", "10.0.0.1:6379"),
    ],
)
def test_a_cluster_is_found_in_ray_s_own_order(
    address: str | None, variable: str | None, joined: str | None, environment: dict[str, str], record: Path
) -> None:
    if variable is not None:
        environment["RAY_ADDRESS"] = variable
    assert cluster_to_join(address) == joined


def test_without_a_record_a_cluster_is_started(environment: dict[str, str]) -> None:
    assert cluster_to_join(None) is None


class FakeRay:
    """Stands where Ray stands, in a process without one; starts a raylet where it is told to."""

    def __init__(self, folder: Path, *, starts: bool) -> None:
        self._folder = folder
        self._starts = starts
        self.running = False
        self.asked: dict[str, Any] = {}
        self.inits = 0
        self.shutdowns = 0
        self.raylet: subprocess.Popen[bytes] | None = None

    def init(self, **options: Any) -> None:
        assert not self.running, "ray.init() was called twice"
        self.asked = options
        self.inits += 1
        time.sleep(0.05)  # The other thread comes meanwhile.
        self.running = True
        if self._starts:
            self.raylet = start_raylet(self._folder / str(self.inits))

    def shutdown(self) -> None:
        if self.running:
            self.running = False
            self.shutdowns += 1
            self.end()

    def end(self) -> None:
        if self.raylet is not None:
            self.raylet.communicate()
            self.raylet = None


@pytest.fixture
def fake_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FakeRay]]:
    made: list[FakeRay] = []
    monkeypatch.setattr(auto_init_hook, "enable_auto_connect", True)

    def make(*, starts: bool) -> FakeRay:
        made.append(FakeRay(tmp_path, starts=starts))
        for name in ("init", "shutdown"):
            monkeypatch.setattr(f"ray.{name}", getattr(made[-1], name))
        monkeypatch.setattr("ray.is_initialized", lambda: made[-1].running)
        return made[-1]

    yield make
    for each in made:
        each.end()


def test_a_ray_that_this_process_starts_ends_with_it(
    fake_ray: Callable[..., FakeRay], environment: dict[str, str]
) -> None:
    ray, connection = fake_ray(starts=True), RayConnection()
    connection.join("run", None)
    assert connection.ends_ray
    assert (ray.asked["address"], ray.asked["include_dashboard"]) == (None, False)
    assert environment["RAY_enable_metrics_collection"] == "0"


def test_a_ray_that_is_on_record_is_not_ended(
    fake_ray: Callable[..., FakeRay],
    environment: dict[str, str],
    record: Path,
    listening: int,
) -> None:
    record.write_text(f"127.0.0.1:{listening}")
    ray, connection = fake_ray(starts=False), RayConnection()
    connection.join("run", None)
    assert not connection.ends_ray
    assert (ray.asked["address"], ray.asked["include_dashboard"]) == (None, None)
    assert not any(name.startswith(("RAY_SERVE", "RAY_TRAIN", "RAY_enable", "RAY_task")) for name in environment)


def test_what_ends_with_a_session_is_told_by_what_it_started(
    fake_ray: Callable[..., FakeRay], tmp_path: Path, environment: dict[str, str]
) -> None:
    # Ray found a cluster where none was expected, in a process that has one of its own already.
    own = start_raylet(tmp_path / "own")
    fake_ray(starts=False)
    connection = RayConnection()
    try:
        connection.join("run", None)
        assert not connection.ends_ray
    finally:
        own.communicate()


# --- sessions are counted ---


def test_the_last_session_ends_the_ray_that_the_first_one_started(
    fake_ray: Callable[..., FakeRay], environment: dict[str, str]
) -> None:
    ray, connection = fake_ray(starts=True), RayConnection()
    connection.join("first", None)
    connection.join("second", None)
    connection.leave("first")
    connection.leave("first")
    assert (ray.running, connection.ends_ray) == (True, True)
    connection.leave("second")
    assert (ray.running, ray.inits, ray.shutdowns) == (False, 1, 1)


def test_a_ray_of_the_user_s_outlives_all_sessions(
    fake_ray: Callable[..., FakeRay], environment: dict[str, str]
) -> None:
    ray, connection = fake_ray(starts=True), RayConnection()
    ray.init()
    for name in ("first", "second"):
        connection.join(name, None)
    for name in ("first", "second"):
        connection.leave(name)
    assert (ray.running, connection.ends_ray) == (True, False)


def test_no_thread_of_a_session_starts_a_ray_of_its_own(
    fake_ray: Callable[..., FakeRay], environment: dict[str, str]
) -> None:
    ray, connection = fake_ray(starts=True), RayConnection()
    for name in ("first", "second"):
        connection.join(name, None)
    ray.shutdown()  # By the user, under both.
    auto_init_hook.auto_init_ray()
    connection.leave("first")
    auto_init_hook.auto_init_ray()
    assert (ray.running, ray.inits) == (False, 1)
    connection.leave("second")
    auto_init_hook.auto_init_ray()
    assert ray.running


def test_sessions_of_a_ray_that_is_gone_do_not_count(
    fake_ray: Callable[..., FakeRay], environment: dict[str, str]
) -> None:
    ray, connection = fake_ray(starts=True), RayConnection()
    connection.join("lost", None)
    ray.shutdown()
    connection.join("next", None)
    connection.leave("lost")
    assert ray.running
    connection.leave("next")
    assert (ray.running, ray.shutdowns) == (False, 2)


def test_sessions_in_threads_start_one_ray_and_end_it_once(
    fake_ray: Callable[..., FakeRay], environment: dict[str, str]
) -> None:
    ray, connection = fake_ray(starts=True), RayConnection()
    failures: list[BaseException] = []
    together = threading.Barrier(4)

    def come_and_go(name: str) -> None:
        try:
            together.wait()
            for _ in range(3):
                connection.join(name, None)
                assert ray.running
                connection.leave(name)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=come_and_go, args=(f"run {number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert not ray.running
    assert ray.inits == ray.shutdowns


def test_the_thread_that_starts_ray_outlives_the_one_that_builds(
    fake_ray: Callable[..., FakeRay], environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel ends Ray's services with the thread that started them."""
    ray, connection = fake_ray(starts=True), RayConnection()
    starters: list[threading.Thread] = []

    def recorded(*arguments: Any, **options: Any) -> None:
        starters.append(threading.current_thread())
        connect(*arguments, **options)

    monkeypatch.setattr(module, "connect", recorded)
    building = threading.Thread(target=connection.join, args=("run", None))
    building.start()
    building.join()
    (starter,) = starters
    assert ray.running
    assert starter.is_alive()
    connection.leave("run")
    starter.join(5)
    assert not starter.is_alive()


# --- errors where Ray is not available ---


def refuse(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def init(**_: Any) -> None:
        raise error

    monkeypatch.setattr("ray.init", init)


@pytest.mark.parametrize(
    ("error", "variables", "field", "value", "said"),
    [
        (
            OSError("validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes: /scratch/..."),
            {"TMPDIR": "/scratch/job.1"},
            "TMPDIR",
            "/scratch/job.1",
            "set RAY_TMPDIR to a folder with a short path",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/home/me/.ray"),
            {"HOME": "/home/me"},
            "HOME",
            "/home/me",
            "RAY_AUTH_MODE=disabled",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/data/ray"),
            {"RAY_TMPDIR": "/data"},
            "RAY_TMPDIR",
            "/data",
            "set RAY_TMPDIR to a writable folder",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "/data/ray"),
            {"RAY_TMPDIR": "/data"},
            "RAY_TMPDIR",
            "/data",
            "no space is left there",
        ),
        (
            ValueError("The configured object store size (60.0 GB) exceeds /dev/shm size (0.06 GB)."),
            {},
            "/dev/shm",
            None,
            "--shm-size",
        ),
        (
            OSError(errno.EADDRINUSE, "Address already in use"),
            {},
            "resources.ray_address",
            "local",
            "a port that Ray needs is in use",
        ),
        (
            Exception("The current node timed out during startup."),
            {},
            "resources.ray_address",
            "local",
            "timed out during startup.*session_latest/logs",
        ),
    ],
)
def test_a_ray_that_cannot_start_says_what_to_change(
    error: Exception,
    variables: dict[str, str],
    field: str,
    value: str | None,
    said: str,
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    del environment["RAY_TMPDIR"]
    environment.update(variables)
    refuse(monkeypatch, error)
    with pytest.raises(ConfigError, match=said) as caught:
        connect("local")
    assert caught.value.field == field
    assert value is None or caught.value.value == value
    assert caught.value.__cause__ is error


def test_a_folder_of_sockets_with_a_long_path_is_named_by_the_real_ray(
    environment: dict[str, str], tmp_path: Path
) -> None:
    environment["RAY_TMPDIR"] = str(tmp_path / ("x" * 90))
    Path(environment["RAY_TMPDIR"]).mkdir()
    with pytest.raises(ConfigError, match="longer than the 107 bytes") as caught:
        connect("local", log_to_driver=False)
    assert caught.value.field == "RAY_TMPDIR"
    assert processes_of_ray() == []


@pytest.fixture
def listening() -> Iterator[int]:
    """A port that answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> str:
    """An address at which nothing answers."""
    monkeypatch.setattr(module, "_PROBE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("given", ["setting", "variable", "record"])
def test_a_cluster_that_is_gone_is_found_in_seconds(
    given: str, silent: str, environment: dict[str, str], record: Path, fake_ray: Callable[..., FakeRay]
) -> None:
    ray = fake_ray(starts=False)
    record.write_text(silent)
    if given == "variable":
        environment["RAY_ADDRESS"] = silent
    started = time.monotonic()
    with pytest.raises(ConfigError, match=f"{silent}.*cannot be joined") as caught:
        connect(silent if given == "setting" else None)
    assert time.monotonic() - started < 5
    assert caught.value.field == ("RAY_ADDRESS" if given == "variable" else "resources.ray_address")
    assert ("ray stop" in caught.value.remedy) == (given == "record")
    assert ray.inits == 0


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("Version mismatch: The cluster was started with: Ray: 2.59.0"), "versions of Ray and Python"),
        (ConnectionError("ray client connection timeout"), "cannot be joined .ray client connection timeout"),
    ],
)
def test_a_cluster_that_refuses(
    error: Exception, said: str, listening: int, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, error)
    with pytest.raises(ConfigError, match=said) as caught:
        connect(f"127.0.0.1:{listening}")
    assert (caught.value.field, caught.value.value) == ("resources.ray_address", f"127.0.0.1:{listening}")


def test_what_a_failed_start_leaves_is_ended(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[subprocess.Popen[bytes]] = []
    # A service of Ray's is known by the files that it runs.
    service = str(Path(module.ray.__file__).parent / "raylet")

    def init(**_: Any) -> None:
        left.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", service]))
        raise RuntimeError("the raylet did not come")

    monkeypatch.setattr("ray.init", init)
    with pytest.raises(ConfigError, match="the raylet did not come"):
        connect("local")
    assert not psutil.pid_exists(left[0].pid)
