"""Every way in which a run may end, on a cluster that continues: nothing of it is left."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import ray

from rlhf_ray import PPOConfig
from rlhf_ray.algorithm import start
from rlhf_ray.algorithm.algorithm import Algorithm
from rlhf_ray.errors import ConfigError
from rlhf_ray.learner.remote.group import LearnerGroup
from rlhf_ray.prompts.stream import PromptStream
from rlhf_ray.rewards.pool import RewardPool
from rlhf_ray.rollouts.app import RolloutApp

pytestmark = [pytest.mark.engine, pytest.mark.slow]


class Broken(Exception):
    """What a test breaks."""


def tiny_config(run_dir: Path) -> PPOConfig:
    """One replica, one learner and one reward worker on 0.9 CPUs."""
    return (
        PPOConfig()
        .data(batch_size=8)
        .rollouts(group_size=2, max_prompt_tokens=16, num_threads=1)
        .learners(num_threads=1, max_tokens_per_microbatch=256)
        .training(iterations=1000, num_minibatches=1)
        .resources(cpus_per_replica=0.3, cpus_per_learner=0.3, cpus_per_reward_worker=0.3)
        .reporting(run_dir=str(run_dir), tensorboard=False, progress="off")
    )


@pytest.fixture(scope="module")
def users_ray(fake_gpus: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """A cluster that no session here started, and none may end."""
    if ray.is_initialized():
        ray.shutdown()
    with fake_gpus():
        ray.init(num_cpus=2, num_gpus=1, log_to_driver=False, namespace="rlhf_ray")
    yield
    ray.shutdown()


def broken(*_: Any, **__: Any) -> None:
    raise Broken("the cause")


@pytest.mark.parametrize(
    ("part", "method"),
    [
        (start, "_rollout_app"),
        (start, "RewardPool"),
        (PromptStream, "open"),
        (RewardPool, "start"),
        (RolloutApp, "wait_ready"),
        (LearnerGroup, "wait_ready"),
    ],
)
def test_a_start_in_which_one_part_fails(
    part: Any, method: str, users_ray: None, leftovers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(part, method, broken)
        with pytest.raises(Broken, match="the cause"):
            tiny_config(tmp_path / "run").resources(device="cpu").build_algo()
    leftovers.assert_none(tmp_path / "run")
    assert ray.is_initialized()


def test_a_run_that_does_not_fit_the_cluster(users_ray: None, leftovers: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 CPUs"):
        tiny_config(tmp_path / "run").resources(device="cpu", cpus_per_learner=64.0).build_algo()
    leftovers.assert_none(tmp_path / "run")


def quiet(leftovers: Any) -> dict[str, object]:
    """What runs when nothing has changed for two seconds: readers of Ray Data come and go, and take some CPU."""
    kinds = ("actors", "placement groups", "Serve applications", "processes", "resources")
    seen: list[dict[str, object]] = []
    ends_at = time.monotonic() + 60.0
    while len(seen) < 4 or any(one != seen[-1] for one in seen[-4:]):
        assert time.monotonic() < ends_at, seen[-4:]
        found = leftovers.found()
        seen.append({kind: found.get(kind) for kind in kinds})
        time.sleep(0.5)
    return seen[-1]


def test_a_run_in_a_folder_of_any_name_that_is_reconfigured_and_fails(
    users_ray: None, leftovers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "läuft ü #1?%", tmp_path / "実験"
    algorithm = tiny_config(first).resources(device="cpu").build_algo()
    algorithm.train()
    in_use = quiet(leftovers)

    # As Ray Tune does with reuse_actors.
    assert algorithm.reset_config(
        tiny_config(second).resources(device="cpu").training(lr=1e-3).to_dict(),
    )
    algorithm._iteration = 0
    assert algorithm.train()["learner"]["policy_version"] == 1
    assert in_use == quiet(leftovers)

    monkeypatch.setattr(algorithm._running().learners, "update", broken)
    with pytest.raises(Broken, match="the cause"):
        try:
            algorithm.train()
        finally:
            algorithm.stop()
    leftovers.assert_none(first, second)

    # The controller of a Serve that could not read a name would fail every application that comes later.
    again = tiny_config(tmp_path / "again").resources(device="cpu").build_algo()
    again.train()
    again.stop()
    leftovers.assert_none(tmp_path / "again")


def test_no_process_of_a_run_on_cpus_sees_a_gpu(
    users_ray: None, processes: Callable[[str], list[Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a word about the device: the engine is vLLM's CPU build, whatever GPUs Ray offers."""

    def hidden(completions: list[str], **_: Any) -> list[float]:
        return [float(os.environ["CUDA_VISIBLE_DEVICES"] == "")] * len(completions)

    with caplog.at_level(logging.WARNING, logger="rlhf_ray"):
        algorithm = tiny_config(tmp_path / "run").rewards(hidden).build_algo()
    try:
        assert "the run uses CPUs: the installed vLLM is its CPU build" in caplog.text
        assert algorithm.train()["rollouts"]["reward_mean"] == 1.0
        for title in ("ray::ServeReplica", "ray::RayTrainWorker", "ray::Bridge", "ray::Sequential"):
            started = processes(title)
            assert started, title
            # Ray takes the GPUs away when it has read this.
            assert {each.environ().get("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO") for each in started} == {"1"}, title
    finally:
        algorithm.stop()


def test_two_algorithms_that_are_built_at_once_share_the_ray_that_one_of_them_starts(
    no_session_in_this_process: None, tmp_path: Path
) -> None:
    built: dict[str, Algorithm | BaseException] = {}

    def build(name: str) -> None:
        try:
            built[name] = tiny_config(tmp_path / name).build_algo()
        except BaseException as error:
            built[name] = error

    threads = [threading.Thread(target=build, args=(name,)) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = built["first"], built["second"]
    try:
        assert isinstance(first, Algorithm), first
        assert isinstance(second, Algorithm), second
        first.train()
        first.stop()
        assert second.train()["learner"]["sampling_logprob_diff_max"] < 1e-3
        assert second.train()["learner"]["policy_version"] == 2
    finally:
        for one in (first, second):
            if isinstance(one, Algorithm):
                one.stop()
    assert not ray.is_initialized()
