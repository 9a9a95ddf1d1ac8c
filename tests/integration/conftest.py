"""One Ray session and one running algorithm for all integration tests: starting engines is what costs."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray

from rlhf_ray import PPOConfig
from rlhf_ray.algorithms.algorithm import Algorithm


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
