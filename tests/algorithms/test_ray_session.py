from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlhf_ray import RewardModelReward
from rlhf_ray.algorithms.ray_session import (
    RaySession,
    Shares,
    _below,
    _end,
    _raylets,
    cluster_to_join,
    cpu_shares,
    resolve_device,
)
from rlhf_ray.errors import ConfigError
from rlhf_ray.settings import Settings


def settings_of(*, replicas: int = 1, learners: int = 1, rewards: int = 1, **resources: Any) -> Settings:
    """Settings with that many actors; keyword arguments are reservations."""
    base = Settings()
    return replace(
        base,
        rollouts=replace(base.rollouts, num_replicas=replicas),
        learners=replace(base.learners, num_learners=learners),
        rewards=replace(base.rewards, num_workers=rewards),
        resources=replace(base.resources, **resources),
    )


TABLE: list[tuple[dict[str, Any], float, tuple[float, float, float]]] = [
    # A CPU each where there is one for everybody, with a little left over.
    ({}, 8, (1.0, 1.0, 1.0)),
    ({}, 3.2, (1.0, 1.0, 1.0)),
    ({"replicas": 4, "learners": 4, "rewards": 2}, 64, (1.0, 1.0, 1.0)),
    # A fair share of what is there, less 0.2, rounded down to hundredths.
    ({}, 3, (0.93, 0.93, 0.93)),
    ({}, 2, (0.6, 0.6, 0.6)),
    ({}, 1, (0.26, 0.26, 0.26)),
    ({"replicas": 2, "learners": 2}, 2, (0.36, 0.36, 0.36)),
    # What is set is taken first and the others share the rest.
    ({"cpus_per_replica": 1.0}, 2, (1.0, 0.4, 0.4)),
    ({"replicas": 2, "cpus_per_replica": 0.5}, 2, (0.5, 0.4, 0.4)),
    ({"cpus_per_replica": 6.0}, 16, (6.0, 1.0, 1.0)),
    ({"cpus_per_reward_worker": 0.0}, 2, (0.9, 0.9, 0.0)),
    # All set: the whole cluster may be reserved.
    ({"cpus_per_replica": 1.0, "cpus_per_learner": 0.5, "cpus_per_reward_worker": 0.5}, 2, (1.0, 0.5, 0.5)),
]


@pytest.mark.parametrize(("arguments", "cpus", "shares"), TABLE)
def test_shares_by_hand(arguments: dict[str, Any], cpus: float, shares: tuple[float, float, float]) -> None:
    replica, learner, reward_worker = shares

    found = cpu_shares(settings_of(**arguments), cpus)

    assert found == Shares(replica=replica, learner=learner, reward_worker=reward_worker)


def with_reward_models(*models: RewardModelReward) -> Settings:
    base = settings_of()
    return replace(base, rewards=replace(base.rewards, functions=list(models)))


def test_actors_of_reward_models_share_too() -> None:
    settings = with_reward_models(RewardModelReward("a", num_workers=2), RewardModelReward("b"))
    # A replica, a learner, a reward worker and three actors with a model share 1.8 CPUs.
    assert cpu_shares(settings, 2) == Shares(replica=0.3, learner=0.3, reward_worker=0.3)


@pytest.mark.parametrize(
    ("gpus", "num_gpus", "fits"),
    [(3.0, None, True), (2.0, None, False), (2.0, 0.0, True), (2.0, 0.5, False), (2.5, 0.5, True), (0.0, None, True)],
)
def test_reward_models_have_gpus_beside_replicas_and_learners(gpus: float, num_gpus: float | None, fits: bool) -> None:
    settings = with_reward_models(RewardModelReward("rm", num_gpus=num_gpus))
    if fits:
        assert resolve_device(settings, gpus) is (gpus > 0)
    else:
        with pytest.raises(ConfigError, match=r"the reward models need .* GPUs, and replicas and learners leave 0"):
            resolve_device(settings, gpus)


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
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": gpus, "CPU": 8.0})
    base = settings_of()
    session = RaySession(replace(base, learners=replace(base.learners, num_gpus_per_learner=asked)))
    assert (session.on_gpu, session.learners_on_gpu) == (replicas_on_gpu, learners_on_gpu)


@pytest.mark.parametrize(
    ("asked", "gpus", "field"), [(1, 0.0, "learners.num_gpus_per_learner"), (1, 1.0, "resources.device")]
)
def test_gpus_for_learners_that_the_cluster_lacks(asked: int, gpus: float, field: str) -> None:
    base = settings_of()
    with pytest.raises(ConfigError) as caught:
        resolve_device(replace(base, learners=replace(base.learners, num_gpus_per_learner=asked)), gpus)
    assert caught.value.field == field


def test_a_trial_needs_the_room_of_all_its_actors() -> None:
    settings = settings_of(replicas=4, learners=2, rewards=3, cpus_per_replica=2.0, cpus_per_reward_worker=0.5)
    assert cpu_shares(settings, 64).total(settings) == 4 * 2.0 + 2 * 1.0 + 3 * 0.5
    with_model = with_reward_models(RewardModelReward(path="m", num_workers=2))
    assert cpu_shares(with_model, 64).total(with_model) == 1.0 + 1.0 + (1 + 2) * 1.0


@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("counts", [(1, 1, 1), (4, 2, 1), (8, 8, 8)])
def test_derived_shares_fit_the_cluster_and_leave_a_little(cpus: float, counts: tuple[int, int, int]) -> None:
    replicas, learners, rewards = counts

    shares = cpu_shares(settings_of(replicas=replicas, learners=learners, rewards=rewards), cpus)

    taken = shares.replica * replicas + shares.learner * learners + shares.reward_worker * rewards
    assert 0 < taken <= cpus - 0.2 + 1e-9


@pytest.mark.parametrize(
    ("arguments", "cpus"),
    [
        ({"cpus_per_learner": 3.0}, 2),
        # Nothing is left for those that are not set.
        ({"cpus_per_learner": 2.0}, 2),
        ({"cpus_per_learner": 1.79}, 2),
        ({"replicas": 100}, 1),
        ({}, 0),
    ],
)
def test_more_than_the_cluster_has_is_refused(arguments: dict[str, Any], cpus: float) -> None:
    with pytest.raises(ConfigError, match=f"{cpus} CPUs") as caught:
        cpu_shares(settings_of(**arguments), cpus)
    assert caught.value.field.startswith("resources.cpus_per_replica")


def start_raylet(folder: Path, program: str = "read line") -> subprocess.Popen[bytes]:
    """A shell program in a process that is called like Ray's; by default it ends with its input."""
    raylet = folder / "raylet"
    raylet.symlink_to("/bin/sh")
    return subprocess.Popen([str(raylet), "-c", program], stdin=subprocess.PIPE)


def test_the_workers_of_a_cluster_are_all_below_its_raylet(tmp_path: Path) -> None:
    other = subprocess.Popen(["sleep", "60"])
    cluster = start_raylet(tmp_path, "sleep 60 & sh -c 'sleep 60; true' & wait")
    try:
        deadline = time.perf_counter() + 5
        while len(found := _below(_raylets())) < 3 and time.perf_counter() < deadline:
            time.sleep(0.01)
        assert sorted(process.name() for process in found) == ["sh", "sleep", "sleep"]
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
    """The environment of a process to which no cluster is known; what a test sets is gone afterwards."""
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
        self.asked: dict[str, Any] = {}
        self.raylet: subprocess.Popen[bytes] | None = None

    def init(self, **options: Any) -> None:
        self.asked = options
        if self._starts:
            self.raylet = start_raylet(self._folder)

    def end(self) -> None:
        if self.raylet is not None:
            self.raylet.communicate()


@pytest.fixture
def fake_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FakeRay]]:
    made: list[FakeRay] = []

    def make(*, starts: bool) -> FakeRay:
        made.append(FakeRay(tmp_path, starts=starts))
        monkeypatch.setattr("ray.init", made[-1].init)
        return made[-1]

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0})
    yield make
    for each in made:
        each.end()


def test_a_ray_that_this_process_starts_ends_with_it(
    fake_ray: Callable[..., FakeRay], environment: dict[str, str]
) -> None:
    ray = fake_ray(starts=True)
    assert RaySession(settings_of()).ends_ray
    assert (ray.asked["address"], ray.asked["include_dashboard"]) == (None, False)
    assert environment["RAY_enable_metrics_collection"] == "0"


def test_a_ray_that_is_on_record_is_somebody_else_s(
    fake_ray: Callable[..., FakeRay], environment: dict[str, str], record: Path
) -> None:
    ray = fake_ray(starts=False)
    assert not RaySession(settings_of()).ends_ray
    assert (ray.asked["address"], ray.asked["include_dashboard"]) == (None, None)
    assert not any(name.startswith(("RAY_SERVE", "RAY_TRAIN", "RAY_enable", "RAY_task")) for name in environment)


def test_what_ends_with_a_session_is_told_by_what_it_started(
    fake_ray: Callable[..., FakeRay], tmp_path: Path, environment: dict[str, str]
) -> None:
    # Ray found a cluster where nobody expected one, in a process that has one of its own already.
    (tmp_path / "own").mkdir()
    own = start_raylet(tmp_path / "own")
    fake_ray(starts=False)
    try:
        assert not RaySession(settings_of()).ends_ray
    finally:
        own.communicate()


def test_a_run_that_does_not_fit_leaves_no_cluster_behind(
    fake_ray: Callable[..., FakeRay], environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shut_down: list[bool] = []
    fake_ray(starts=False)
    # There is one from init() on.
    there = iter([False, True])
    monkeypatch.setattr("ray.is_initialized", lambda: next(there))
    monkeypatch.setattr("ray.shutdown", lambda: shut_down.append(True))
    base = settings_of()
    with pytest.raises(ConfigError):
        RaySession(replace(base, learners=replace(base.learners, num_gpus_per_learner=1)))
    assert shut_down == [True]
