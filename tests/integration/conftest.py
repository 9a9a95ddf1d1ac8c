"""One Ray session and one running algorithm for all integration tests: starting engines is what costs."""

from __future__ import annotations

import gc
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray
from ray import serve
from ray.util.state import list_actors, list_objects, list_placement_groups

from rlhf_ray import PPOConfig
from rlhf_ray.algorithm.algorithm import Algorithm
from rlhf_ray.reporting.run_directory import RunLock
from rlhf_ray.rollouts.app import serve_is_running


def small_config(run_dir: Path) -> PPOConfig:
    """The quickstart on little data: two rollout replicas, two FSDP2 learners on gloo."""
    return (
        PPOConfig()
        .data(batch_size=12)
        .rollouts(num_replicas=2, group_size=4, max_prompt_tokens=16, num_threads=1)
        .learners(num_learners=2, num_threads=1, max_tokens_per_microbatch=256)
        # With a KL in the reward the first ratio is measured.
        .training(iterations=1000, num_minibatches=2, kl_coef=1e-4)
        .evaluation(num_prompts=32)
        .reporting(run_dir=str(run_dir), wandb_project="tests")
        .fault_tolerance(max_group_retries=20)
    )


def processes_titled(title: str) -> list[psutil.Process]:
    """Below this process, oldest first: a raylet is its child, and workers are the raylet's."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "".join(process.cmdline()).startswith(title):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return sorted(found, key=lambda process: process.pid)


# Ray Data's own, which end with the cluster.
_KEPT_ACTORS = {"_AutoscalingCoordinatorActor", "_StatsActor"}
_PROCESSES = ("VLLM", "ray::ServeReplica", "ray::RayTrainWorker", "ray::Sequential", "ray::Concurrent", "ray::Bridge")
_THREADS = (
    "learner-group",
    "rollout-app",
    "rollout-controller",
    "publication",
    "checkpoint",
    "start-up",
)
# What all processes of a run, and this one, may keep for a moment of a busy machine.
_SMALL_BYTES = 1_000_000


class Leftovers:
    """All that a run may leave behind on a cluster that continues, less what was there before."""

    def __init__(self) -> None:
        self._before = self._files()
        self._since = time.time()

    def found(self) -> dict[str, object]:
        """What is left, by its kind."""
        gc.collect()
        # Or Ray asks the one Ray of the machine, and there may be others.
        address = ray.get_runtime_context().gcs_address
        alive, groups = list_actors(address, filters=[("state", "=", "ALIVE")]), list_placement_groups(address)
        there = {
            "actors": {one.class_name for one in alive} - _KEPT_ACTORS,
            "placement groups": {one.placement_group_id for one in groups if one.state != "REMOVED"},
            "Serve applications": self._applications(),
            "processes": self._processes(),
            "threads": {one.name for one in threading.enumerate() if one.name.startswith(_THREADS)},
            "files": self._files() - self._before,
            "objects": {
                one.object_id
                for one in list_objects(address, limit=1000, raise_on_missing_output=False)
                if (one.object_size or 0) > _SMALL_BYTES
            },
            "resources": self._taken(),
        }
        return {kind: what for kind, what in there.items() if what}

    def assert_none(self, *run_dirs: Path, within_s: float = 60.0) -> None:
        """Nothing is left, after the seconds that Ray takes to notice, and the run directories are free."""
        deadline = time.monotonic() + within_s
        while (found := self.found()) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert found == {}
        for run_dir in run_dirs:
            RunLock.take(run_dir).release()

    @staticmethod
    def _applications() -> set[str]:
        try:
            return set(serve.status().applications) if serve_is_running() else set()
        except ray.exceptions.ActorDiedError:  # A supervisor has stopped Serve since the question whether it runs.
            return set()

    def _processes(self) -> set[str]:
        """Also such as have lost their parent."""
        titles = {
            "".join(each.info["cmdline"] or ())
            for each in psutil.process_iter(["cmdline", "create_time", "status"])
            if each.info["create_time"] >= self._since and each.info["status"] != psutil.STATUS_ZOMBIE
        }
        return {title for title in _PROCESSES if any(each.startswith(title) for each in titles)}

    @staticmethod
    def _files() -> set[Path]:
        """In shared memory, and temporary folders."""
        return {*Path("/dev/shm").iterdir(), *Path(tempfile.gettempdir()).glob("rlhf-ray-*")}

    @staticmethod
    def _taken() -> dict[str, float]:
        """CPUs and GPUs that Ray believes to be in use."""
        free, all_of_them = ray.available_resources(), ray.cluster_resources()
        taken = {name: all_of_them.get(name, 0.0) - free.get(name, 0.0) for name in ("CPU", "GPU")}
        return {name: amount for name, amount in taken.items() if amount > 1e-6}


@pytest.fixture
def leftovers() -> Leftovers:
    """What the test's runs leave on the cluster that is there when it begins."""
    return Leftovers()


@pytest.fixture(scope="session")
def processes() -> Callable[[str], list[psutil.Process]]:
    """:func:`processes_titled`, for what is to be killed."""
    return processes_titled


@pytest.fixture(scope="session")
def send(processes: Callable[[str], list[psutil.Process]]) -> Callable[..., None]:
    """Send a signal, by default that which kills, to the newest process of a title."""

    def send(title: str, number: int = signal.SIGKILL) -> None:
        processes(title)[-1].send_signal(number)

    return send


@pytest.fixture(scope="session")
def small() -> Callable[[Path], PPOConfig]:
    """:func:`small_config`, for algorithms of a test's own."""
    return small_config


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    if ray.is_initialized():
        ray.shutdown()
    ray.init(num_cpus=4, log_to_driver=False, namespace="rlhf_ray")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def algorithm(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Algorithm]:
    # The time that is lost with a worker that hangs.
    algorithm = small_config(tmp_path_factory.mktemp("run") / "first").rewards(timeout_s=5.0).build_algo()
    yield algorithm
    algorithm.stop()


@pytest.fixture(scope="module")
def no_session_in_this_process() -> None:
    """For tests that start a Ray elsewhere: two at once would share the cores."""
    if ray.is_initialized():
        ray.shutdown()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run those after all others of this folder, when nobody needs the session any more."""
    places = [place for place, item in enumerate(items) if item.path.is_relative_to(Path(__file__).parent)]
    here = [items[place] for place in places]
    here.sort(key=lambda item: "no_session_in_this_process" in getattr(item, "fixturenames", ()))
    for place, item in zip(places, here, strict=True):
        items[place] = item
