"""A run's connection to Ray: what it decides there, and that it ends only what it started."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_ray.algorithm import ray_session as module
from rlhf_ray.algorithm import run_plan
from rlhf_ray.algorithm.ray_connection import RayConnection
from rlhf_ray.algorithm.ray_session import RaySession
from rlhf_ray.config.settings import Settings
from rlhf_ray.errors import ConfigError
from rlhf_ray.tune.trial_algorithm import Trial, TrialSession


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The build of vLLM, whatever is installed here: one entry; it fits the test."""
    build: list[str | None] = [None]
    monkeypatch.setattr(run_plan, "vllm_build", lambda: build[0])
    return build


def cluster_of(monkeypatch: pytest.MonkeyPatch, **resources: float) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: resources)
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": resources}])


@pytest.mark.parametrize(
    ("asked", "gpus", "replicas_on_gpu", "learners_on_gpu"),
    [
        (None, 2.0, True, True),
        (1, 2.0, True, True),
        # One GPU is enough where the learner takes none.
        (0, 1.0, True, False),
        (None, 0.0, False, False),
        (0, 0.0, False, False),
    ],
)
def test_learners_may_stay_on_the_cpu(
    asked: int | None, gpus: float, replicas_on_gpu: bool, learners_on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CONNECTION", RayConnection())
    monkeypatch.setattr("ray._private.auto_init_hook.enable_auto_connect", True)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    cluster_of(monkeypatch, GPU=gpus, CPU=8.0)
    base = Settings()
    session = RaySession(replace(base, learners=replace(base.learners, num_gpus_per_learner=asked)))
    device = session.placement.device
    assert (device.on_gpu, device.learners_on_gpu) == (replicas_on_gpu, learners_on_gpu)


@pytest.mark.parametrize(
    ("gpus", "build", "level", "line"),
    [
        (2.0, "cpu", logging.WARNING, "uses CPUs: the installed vLLM is its CPU build, so the 2 GPUs that Ray offers"),
        (0.0, "cpu", logging.INFO, "uses CPUs: Ray offers no GPUs"),
        (2.0, "cuda", logging.INFO, "uses GPUs: Ray offers 2 GPUs"),
    ],
)
def test_one_line_says_which_device_is_used_and_why(
    gpus: float,
    build: str,
    level: int,
    line: str,
    vllm: list[str | None],
    ray_is_running: list[bool],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    vllm[0] = build
    cluster_of(monkeypatch, GPU=gpus, CPU=8.0)
    with caplog.at_level(logging.INFO, logger=module.__name__):
        RaySession(Settings()).stop()
    assert [(one.levelno, line in one.getMessage()) for one in caplog.records] == [(level, True)]


@pytest.fixture
def ray_is_running(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether Ray runs in this process: one entry; a session starts it, and may end it."""
    running: list[bool] = []
    monkeypatch.setattr(module, "_CONNECTION", RayConnection())
    monkeypatch.setattr("ray._private.auto_init_hook.enable_auto_connect", True)
    monkeypatch.setattr("rlhf_ray.algorithm.ray_connection.connect", lambda address, **_: running.append(True))
    monkeypatch.setattr("ray.is_initialized", lambda: bool(running))
    monkeypatch.setattr("ray.shutdown", running.clear)
    cluster_of(monkeypatch, CPU=8.0)
    return running


def test_a_run_that_does_not_fit_leaves_no_cluster_behind(ray_is_running: list[bool]) -> None:
    base = Settings()
    with pytest.raises(ConfigError):
        RaySession(replace(base, learners=replace(base.learners, num_gpus_per_learner=1)))
    assert ray_is_running == []


def test_a_session_that_ends_leaves_ray_to_the_others(ray_is_running: list[bool]) -> None:
    first, second = RaySession(Settings()), RaySession(Settings())
    first.stop()
    first.stop()
    assert ray_is_running == [True]
    second.stop()
    assert ray_is_running == []


def test_a_reservation_that_does_not_end_keeps_no_cluster(
    ray_is_running: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reserved:
        def end(self) -> None:
            raise TimeoutError("the supervisor does not answer")

    monkeypatch.setattr(TrialSession, "_placed", RaySession._placed)
    session = TrialSession(Settings(), Trial(name="t", folder=Path(), cpus=0.1))
    session._reservation = Reserved()  # type: ignore[assignment]
    session.stop()
    assert ray_is_running == []
