from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray import RewardModelReward
from rlhf_ray.config.settings import LearnerSettings, ResourceSettings, RewardSettings, RolloutSettings, Settings
from rlhf_ray.doctor import cluster
from rlhf_ray.doctor.check import Check
from rlhf_ray.doctor.child import ChildFailure


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The build of vLLM, whatever is installed here: one entry; it fits the test."""
    build: list[str | None] = [None]
    monkeypatch.setattr("rlhf_ray.algorithm.run_plan.vllm_build", lambda: build[0])
    return build


def judged(settings: Settings, *, cpus: float = 8, gpus: float = 0) -> Check:
    found = {"CPU": cpus, "GPU": gpus, "object_store_memory": 4 * 1024**3, "nodes": [{"CPU": cpus, "GPU": gpus}]}
    return cluster.judge_resources(settings, found, address=None)


def test_what_ray_has_is_told() -> None:
    check = judged(Settings())
    assert check.status == "ok"
    assert "8 CPUs, 0 GPUs, 4.0 GiB object store" in check.detail
    assert "1 per replica" in check.detail


@pytest.mark.parametrize(
    ("gpus", "build", "told"),
    [
        (2, "cuda", "the run uses GPUs: Ray offers 2 GPUs"),
        (2, "cpu", "the run uses CPUs: the installed vLLM is its CPU build"),
        (0, "cpu", "the run uses CPUs: Ray offers no GPUs"),
    ],
)
def test_the_device_is_told_with_its_reason(gpus: float, build: str, told: str, vllm: list[str | None]) -> None:
    vllm[0] = build
    assert told in judged(Settings(), gpus=gpus).detail


def test_what_fits_the_cluster_and_no_node_is_told() -> None:
    settings = Settings(rollouts=RolloutSettings(tensor_parallel_size=4))
    nodes = [{"CPU": 8.0, "GPU": 3.0}] * 2
    check = cluster.judge_resources(settings, {"CPU": 16.0, "GPU": 6.0, "nodes": nodes}, address="head:6379")
    assert check.status == "fail"
    assert "rollouts.tensor_parallel_size = 4" in check.detail


@pytest.mark.parametrize(("gpus", "status"), [(8, "ok"), (7, "fail")])
def test_gpus_of_replicas_and_learners_add_up(gpus: int, status: str) -> None:
    settings = Settings(
        rollouts=RolloutSettings(num_replicas=2, tensor_parallel_size=2), learners=LearnerSettings(num_learners=4)
    )
    assert judged(settings, gpus=gpus).status == status
    on_cpus = replace(settings, resources=ResourceSettings(device="cpu"))
    assert judged(on_cpus, gpus=gpus).status == "ok"


@pytest.mark.parametrize(
    ("gpus", "colocate", "status"), [(3, False, "ok"), (2, False, "fail"), (2, "auto", "ok"), (1, "auto", "fail")]
)
def test_gpus_of_reward_models_come_on_top(gpus: int, colocate: Any, status: str) -> None:
    settings = Settings(
        rewards=RewardSettings(functions=[RewardModelReward("rm", num_gpus=0.5, num_workers=2)]),
        resources=ResourceSettings(colocate=colocate),
    )
    assert judged(settings, gpus=gpus).status == status


def test_learners_that_ask_for_gpus_where_there_are_none() -> None:
    check = judged(Settings(learners=LearnerSettings(num_gpus_per_learner=1)))
    assert check.status == "fail"
    assert "learners.num_gpus_per_learner" in check.detail


def test_reservations_beyond_the_cluster_would_wait_for_ever() -> None:
    settings = Settings(resources=ResourceSettings(cpus_per_replica=4, cpus_per_learner=5))
    assert judged(settings, cpus=8).status == "fail"
    assert judged(settings, cpus=16).status == "ok"


@pytest.mark.parametrize(("address", "told"), [(None, "cannot start"), ("head:6379", "head:6379 cannot be joined")])
def test_no_ray_is_a_failure_with_its_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str | None, told: str
) -> None:
    def no_ray(*_: Any, **__: Any) -> dict[str, float]:
        raise ChildFailure("ConnectionError: nobody there", Path("log.txt"))

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(cluster, "call_in_child", no_ray)
    check = cluster.check_ray(Settings(resources=ResourceSettings(ray_address=address)))
    assert check.status == "fail"
    assert told in check.detail
    assert "nobody there" in check.detail
    assert "log.txt" in check.remedy


def test_ray_address_of_the_environment_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    def join(function: Any, address: str | None, **_: Any) -> dict[str, Any]:
        asked.append(address)
        return {"CPU": 8.0, "nodes": [{"CPU": 8.0}]}

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(cluster, "call_in_child", join)
    assert "joined 10.0.0.1:6379" in cluster.check_ray(Settings()).detail
    # The child has the variable too, and names it where nothing answers there.
    assert asked == [None]


def test_the_ray_on_record_is_looked_at_as_a_run_would_join_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str | None] = []

    def join(function: Any, address: str | None, **_: Any) -> dict[str, Any]:
        asked.append(address)
        return {"CPU": 8.0, "nodes": [{"CPU": 8.0}]}

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(cluster, "call_in_child", join)
    assert "starts here" in cluster.check_ray(Settings()).detail
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.1:6379")
    assert "joined 10.0.0.1:6379" in cluster.check_ray(Settings()).detail
    # Not by its address: Ray shows the token of the home folder only to a cluster that it found by itself.
    assert asked == [None, None]


@pytest.mark.parametrize(
    ("address", "options"),
    [
        (None, {"include_dashboard": False}),
        ("local", {"include_dashboard": False}),
        ("head:6379", {"include_dashboard": None}),
    ],
)
def test_the_child_leaves_it_to_ray_what_to_join(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str | None, options: dict[str, Any]
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr("rlhf_ray.algorithm.ray_connection._probe", lambda *_: None)
    monkeypatch.setattr("ray.init", lambda **given: asked.append(given))
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    dead, living = ({"Alive": alive, "Resources": {"CPU": 2.0}} for alive in (False, True))
    monkeypatch.setattr("ray.nodes", lambda: [dead, living])
    monkeypatch.setattr("ray.shutdown", lambda: None)
    assert cluster._resources(address) == {"CPU": 2.0, "nodes": [{"CPU": 2.0}]}
    assert asked == [{"address": address, "log_to_driver": False, **options}]


def test_what_keeps_ray_from_starting_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (long := tmp_path / ("x" * 90)).mkdir()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    monkeypatch.setattr(cluster, "call_in_child", lambda function, address, **_: function(address))
    check = cluster.check_ray(Settings())
    assert (check.status, check.name) == ("fail", "Ray")
    assert check.detail == f"RAY_TMPDIR = {long}"
    assert "set RAY_TMPDIR to a folder with a short path" in check.remedy
