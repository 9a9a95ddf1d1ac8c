"""The connection of this process to Ray: made once for all sessions, ended with the last, and clear where it fails."""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import ray
from ray._private import auto_init_hook, services

from rlhf_ray.errors import ConfigError

__all__ = ["RayConnection", "cluster_to_join", "connect", "processes_of_ray"]

_LOG = logging.getLogger(__name__)
# How long workers have to end after their raylet.
_GRACE_S = 5.0
# Ray waits a minute or more for a head node that does not answer, and then ends the process.
_PROBE_S = 10.0
_ADDRESS = "resources.ray_address"

# What a cluster that ends with this process does not need, and what would wake its processes up on two busy cores.
_OWN_CLUSTER_ENV = {
    # The end of the only node is not announced.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # It has no dashboard to show them.
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    # Ten looks a second at a pool that changes only when a replica dies.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
}


class RayConnection:
    """Shared by the sessions of this process, which come and go in any thread.

    The first session connects where the process is not connected. The last one to leave disconnects, if it was a
    session that connected, and with that ends a cluster that was started here.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._sessions: set[object] = set()
        self._is_ours = False
        self._raylets: list[psutil.Process] = []
        self._left = threading.Event()

    @property
    def ends_ray(self) -> bool:
        """Whether the cluster ends with the last session: one of them started it."""
        # By what came of it: where ray.init() looks for a cluster is for Ray to decide, and a user's must not be ended.
        return bool(self._raylets)

    def join(self, session: object, address: str | None, **options: Any) -> None:
        """Count a session in, and connect where this process is not connected; options are those of :func:`connect`.

        Raises:
            ConfigError: Ray cannot be started or joined; says why.
        """
        with self._lock:
            if not ray.is_initialized():
                self._sessions.clear()  # What they were connected to is gone.
                self._is_ours, self._raylets = True, []
                before = processes_of_ray("raylet")
                self._left.set()
                self._left = threading.Event()
                _call_in_lasting_thread(partial(connect, address, **options), self._left)
                self._raylets = [raylet for raylet in processes_of_ray("raylet") if raylet not in before]
            elif not self._sessions:
                self._is_ours, self._raylets = False, []
            self._sessions.add(session)
            _start_ray_when_called(False)

    def leave(self, session: object) -> None:
        """Count a session out; the last one disconnects what the first one connected."""
        with self._lock:
            if session not in self._sessions:
                return
            self._sessions.discard(session)
            if self._sessions:
                return
            if self._is_ours and ray.is_initialized():
                workers = _below(self._raylets)
                ray.shutdown()
                _end(workers, grace_s=_GRACE_S)
                self._raylets = []
            self._left.set()
            _start_ray_when_called(True)


def _call_in_lasting_thread(call: Callable[[], None], until: threading.Event) -> None:
    """Make a call in a thread that lives until an event, or in the main thread, which lives as long as the process.

    Ray has the kernel end its services with their parent, which is the thread that started them: a Ray that a thread
    builds an algorithm on would be killed when that thread ends.
    """
    if threading.current_thread() is threading.main_thread():
        call()
        return
    called: Future[None] = Future()

    def run() -> None:
        try:
            call()
            called.set_result(None)
        except BaseException as error:
            called.set_exception(error)
            return
        until.wait()

    threading.Thread(target=run, name="ray-connection", daemon=True).start()
    called.result()


def cluster_to_join(address: str | None) -> str | None:
    """The cluster that ``ray.init(address)`` looks for here; ``None``: it starts one.

    Without an address, in ``RAY_ADDRESS`` neither, that is the cluster on Ray's record: the last that ``ray start``
    started or joined on this machine, until ``ray stop``.
    """
    if address in (None, "auto"):
        address = os.environ.get("RAY_ADDRESS") or address or services.find_bootstrap_address(None)
    return None if address == "local" else address


def connect(address: str | None, **options: Any) -> None:
    """Join the cluster that the address, the environment or Ray's record name, or start one.

    Args:
        address: ``resources.ray_address``.
        options: Others of ``ray.init``.

    Raises:
        ConfigError: That is not possible; names what to change. What a failed start left running is ended.
    """
    joined = cluster_to_join(address)
    if joined is None:
        for name, value in _OWN_CLUSTER_ENV.items():
            os.environ.setdefault(name, value)
    else:
        _probe(address, joined)
    # A busy laptop needs more than Ray's half minute.
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
    # Says at every local start that tokens protect the cluster: nothing that the user can or need do.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    before = processes_of_ray()
    try:
        with _own_process_groups():
            # For a cluster that ends with this run a dashboard's start-up is lost; `ray start --head` has one.
            ray.init(address=address, include_dashboard=False if joined is None else None, **options)
    except Exception as error:
        ray.shutdown()
        _end([process for process in processes_of_ray() if process not in before], grace_s=0.0)
        raise _explained(error, address, joined) from error


@contextmanager
def _own_process_groups() -> Iterator[None]:
    """Within, Ray's services are started in process groups of their own.

    ``timeout`` and process managers send SIGTERM to a whole group. Ray would end under this process, which has to stop
    the run first; of Ctrl-C Ray takes care by itself.
    """
    start = services.ConsolePopen.__init__

    def start_in_own_group(self: Any, *arguments: Any, **options: Any) -> None:
        start(self, *arguments, process_group=0, **options)

    services.ConsolePopen.__init__ = start_in_own_group
    try:
        yield
    finally:
        services.ConsolePopen.__init__ = start


def _start_ray_when_called(allowed: bool) -> None:
    """Whether a call of Ray's API starts a Ray where there is none.

    Where a user ends Ray under an algorithm, one of its threads would start another one, which knows none of its
    objects and which nothing ends.
    """
    auto_init_hook.enable_auto_connect = allowed and os.environ.get("RAY_ENABLE_AUTO_CONNECT", "") != "0"


def processes_of_ray(name: str | None = None) -> list[psutil.Process]:
    """Ray's services below this process, by name or all: a raylet is the sign of a cluster of this process's own."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # It has ended meanwhile.
            own_files = str(Path(ray.__file__).parent)
            if child.name() == name or (name is None and any(own_files in part for part in child.cmdline())):
                found.append(child)
    return found


def _explained(error: Exception, address: str | None, joined: str | None) -> ConfigError:
    """What to change where Ray cannot be started or joined."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if "Version mismatch" in reason:
        return ConfigError(
            _ADDRESS, joined, f"install the cluster's versions of Ray and Python here, or the reverse: {reason}"
        )
    if joined is not None:
        return _unreachable(address, joined, reason)
    folder_variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), "RAY_TMPDIR")
    folder = os.environ.get(folder_variable) or "/tmp"
    if "AF_UNIX" in reason:
        remedy = (
            "the paths of Ray's sockets below this folder are longer than the 107 bytes that the system allows; set "
            "RAY_TMPDIR to a folder with a short path on a local disk, such as /tmp"
        )
        return ConfigError(folder_variable, folder, remedy)
    if "/dev/shm" in reason:
        remedy = (
            f"too small for Ray's object store: free space in it, or give the container a larger one (--shm-size). "
            f"Ray says: {reason}"
        )
        return ConfigError("/dev/shm", _free(Path("/dev/shm")), remedy)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return ConfigError(folder_variable, folder, f"no space is left there ({reason}); free some, or set RAY_TMPDIR")
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        remedy = (
            f"a port that Ray needs is in use ({reason}); end the program that has it, or unset RAY_*_PORT variables"
        )
        return ConfigError(_ADDRESS, address or "local", remedy)
    if isinstance(error, OSError) and error.filename is not None:
        token = Path.home() / ".ray" / "auth_token"
        if token.is_relative_to(str(error.filename)):
            remedy = (
                f"Ray keeps the token that protects a local cluster in {token}, which cannot be written ({reason}); "
                "set HOME to a writable folder, or RAY_AUTH_MODE=disabled to do without a token"
            )
            return ConfigError("HOME", str(Path.home()), remedy)
        remedy = f"Ray's own files cannot be written there ({reason}); set RAY_TMPDIR to a writable folder"
        return ConfigError(folder_variable, folder, remedy)
    remedy = (
        f"Ray cannot start here ({type(error).__name__}: {reason}); its logs are in {folder}/ray/session_latest/logs. "
        "Look for another Ray with `ray status`, and at free memory and disk space with `rlhf-ray doctor`"
    )
    return ConfigError(_ADDRESS, address or "local", remedy)


def _unreachable(address: str | None, joined: str, reason: str) -> ConfigError:
    remedy = f"this cluster cannot be joined ({reason}); start it there (ray start --head), or correct the address"
    if address not in (None, "auto"):
        return ConfigError(_ADDRESS, address, remedy + "; local starts one of the run's own")
    if os.environ.get("RAY_ADDRESS"):
        return ConfigError("RAY_ADDRESS", joined, remedy + "; without this variable Ray starts here")
    remedy += f"; `ray stop` removes it from Ray's record, and {_ADDRESS} = local starts one of the run's own"
    return ConfigError(_ADDRESS, joined, remedy)


def _probe(address: str | None, joined: str) -> None:
    """Find out in seconds whether a cluster answers."""
    place = services.find_bootstrap_address(None) if joined == "auto" and not services.find_gcs_addresses() else joined
    try:
        url = urlsplit(place if place is not None and "://" in place else f"//{place}")
        host, port = url.hostname, url.port
    except ValueError:
        return
    if host is None or port is None:  # Nothing that can be called; Ray knows what to say.
        return
    ends_at = time.monotonic() + _PROBE_S
    while True:
        try:
            socket.create_connection((host, port), timeout=_PROBE_S).close()
            return
        except OSError as error:
            if time.monotonic() > ends_at:
                raise _unreachable(address, joined, str(error)) from error
        time.sleep(0.5)


def _free(folder: Path) -> str:
    status = os.statvfs(folder)
    return f"{status.f_bavail * status.f_frsize / 1e9:.2f} GB free"


def _below(raylets: list[psutil.Process]) -> list[psutil.Process]:
    """All processes below raylets: Ray's workers, and the engines below them."""
    found: list[psutil.Process] = []
    for raylet in raylets:
        with suppress(psutil.NoSuchProcess):
            found += raylet.children(recursive=True)
    return found


def _end(processes: list[psutil.Process], *, grace_s: float) -> None:
    """Kill what does not end by itself: a worker of Ray 2.60 sometimes hangs in its last destructor, for ever."""
    _, left = psutil.wait_procs(processes, timeout=grace_s)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            _LOG.info("process %d (%s) did not end with its cluster and is killed", process.pid, process.name())
            process.kill()
    psutil.wait_procs(left, timeout=_GRACE_S)
