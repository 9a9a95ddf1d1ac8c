"""One Ray session and one running algorithm for all integration tests: starting engines is what costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

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
    algorithm = small_config(tmp_path_factory.mktemp("run") / "first").build_algo()
    yield algorithm
    algorithm.stop()
