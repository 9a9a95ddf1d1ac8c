from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest

from rlhf_ray import RewardModelReward
from rlhf_ray.algorithm import ray_session as module
from rlhf_ray.algorithm.ray_connection import RayConnection
from rlhf_ray.algorithm.ray_session import (
    RaySession,
    Shares,
    check_nodes,
    cpu_shares,
    resolve_colocation,
    resolve_device,
)
from rlhf_ray.config.settings import Settings
from rlhf_ray.errors import ConfigError


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The build of vLLM, whatever is installed here: one entry; it fits the test."""
    build: list[str | None] = [None]
    monkeypatch.setattr(module, "vllm_build", lambda: build[0])
    return build


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
    settings = replace(settings, resources=replace(settings.resources, colocate=False))
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
    monkeypatch.setattr(module, "_CONNECTION", RayConnection())
    monkeypatch.setattr("ray._private.auto_init_hook.enable_auto_connect", True)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": gpus, "CPU": 8.0})
    monkeypatch.setattr(module, "node_resources", lambda: [{"GPU": gpus, "CPU": 8.0}])
    base = settings_of()
    session = RaySession(replace(base, learners=replace(base.learners, num_gpus_per_learner=asked)))
    assert (session.on_gpu, session.learners_on_gpu) == (replicas_on_gpu, learners_on_gpu)


@pytest.mark.parametrize(
    ("asked", "gpus", "field"), [(1, 0.0, "learners.num_gpus_per_learner"), (1, 2.0, "resources.device")]
)
def test_gpus_for_learners_that_the_cluster_lacks(asked: int, gpus: float, field: str) -> None:
    base = settings_of(learners=2)
    with pytest.raises(ConfigError) as caught:
        resolve_device(replace(base, learners=replace(base.learners, num_gpus_per_learner=asked)), gpus)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("device", "gpus", "build", "on_gpu"),
    [
        ("auto", 4.0, "cuda", True),
        ("auto", 4.0, None, True),
        ("auto", 4.0, "cpu", False),
        ("auto", 0.0, "cpu", False),
        ("auto", 0.0, None, False),
        ("cpu", 4.0, "cpu", False),
        # Explicit: the nodes may have another build than the driver.
        ("cuda", 4.0, "cpu", True),
    ],
)
def test_auto_is_the_cpu_where_vllm_is_its_cpu_build(
    device: Any, gpus: float, build: str | None, on_gpu: bool, vllm: list[str | None]
) -> None:
    vllm[0] = build
    assert resolve_device(settings_of(device=device), gpus) is on_gpu


@pytest.mark.parametrize(("device", "gpus"), [("auto", 0.0), ("cpu", 1.0)])
def test_a_cuda_build_of_vllm_is_not_started_on_cpus(device: Any, gpus: float, vllm: list[str | None]) -> None:
    vllm[0] = "cuda"
    with pytest.raises(ConfigError, match=r"CUDA build.*install rlhf-ray\[cpu\]") as caught:
        resolve_device(settings_of(device=device), gpus)
    assert (caught.value.field, caught.value.value) == ("resources.device", device)


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
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": gpus, "CPU": 8.0})
    monkeypatch.setattr(module, "node_resources", lambda: [{"GPU": gpus, "CPU": 8.0}])
    with caplog.at_level(logging.INFO, logger=module.__name__):
        RaySession(settings_of()).stop()
    assert [(one.levelno, line in one.getMessage()) for one in caplog.records] == [(level, True)]


def node(cpus: float, gpus: float = 0.0) -> dict[str, float]:
    return {"CPU": cpus, "GPU": gpus}


SHARES = Shares(replica=1.0, learner=1.0, reward_worker=1.0)


@pytest.mark.parametrize(
    ("tensor_parallel", "replicas", "nodes", "fits"),
    [
        (4, 2, [node(16, 4), node(16, 4)], True),
        (8, 1, [node(16, 4), node(16, 4)], False),
        (3, 2, [node(16, 4), node(16, 4)], True),
        # Six GPUs, of which no node can give a second replica four.
        (4, 2, [node(16, 4), node(16, 2), node(16, 2)], False),
        (2, 3, [node(16, 3), node(16, 3)], False),
        (1, 8, [node(16, 8)], True),
    ],
)
def test_the_gpus_of_a_replica_are_on_one_node(
    tensor_parallel: int, replicas: int, nodes: list[dict[str, float]], fits: bool
) -> None:
    base = settings_of(replicas=replicas)
    settings = replace(base, rollouts=replace(base.rollouts, tensor_parallel_size=tensor_parallel))
    check_nodes(settings, SHARES, nodes, on_gpu=False)
    if fits:
        check_nodes(settings, SHARES, nodes, on_gpu=True)
    else:
        with pytest.raises(ConfigError, match=r"hold \d such at once") as caught:
            check_nodes(settings, SHARES, nodes, on_gpu=True)
        assert (caught.value.field, caught.value.value) == ("rollouts.tensor_parallel_size", tensor_parallel)


@pytest.mark.parametrize("kind", ["replica", "learner", "reward_worker"])
def test_an_actor_finds_its_cpus_on_one_node(kind: str) -> None:
    shares = replace(SHARES, **{kind: 6.0})
    check_nodes(settings_of(), shares, [node(4), node(8)], on_gpu=False)
    message = r"1 actors need 6 CPUs each.*nodes \(4 CPUs and 0 GPUs, 4 CPUs and 0 GPUs\) hold 0"
    with pytest.raises(ConfigError, match=message) as caught:
        check_nodes(settings_of(), shares, [node(4), node(4)], on_gpu=False)
    assert (caught.value.field, caught.value.value) == (f"resources.cpus_per_{kind}", 6.0)


def test_all_actors_find_their_cpus_at_once() -> None:
    settings, tenths = settings_of(replicas=3), Shares(replica=0.1, learner=0.1, reward_worker=0.1)
    check_nodes(settings, tenths, [node(0.3)], on_gpu=False)  # 0.3 / 0.1 is less than 3.
    shares = replace(SHARES, replica=6.0)
    check_nodes(settings, shares, [node(12), node(8)], on_gpu=False)
    with pytest.raises(ConfigError, match=r"3 actors need 6 CPUs each.*hold 2 such at once"):
        check_nodes(settings, shares, [node(11), node(11)], on_gpu=False)


def test_an_actor_finds_cpus_and_gpus_on_the_same_node() -> None:
    shares = replace(SHARES, learner=6.0)
    with pytest.raises(ConfigError, match="need 6 CPUs and 1 GPUs each"):
        check_nodes(settings_of(), shares, [node(8), node(4, 8)], on_gpu=True)
    with_model = with_reward_models(RewardModelReward("rm", num_gpus=2.0))
    with pytest.raises(ConfigError, match="need 1 CPUs and 2 GPUs each") as caught:
        check_nodes(with_model, SHARES, [node(8, 1), node(8, 1)], on_gpu=False)
    assert caught.value.field == "rewards.functions"


def sharing(**changes: Any) -> Settings:
    """Two replicas and two learners; keyword arguments are settings of any section."""
    settings = settings_of(replicas=2, learners=2)
    for name, value in changes.items():
        section = next(
            section for section in ("resources", "rollouts", "learners") if hasattr(getattr(settings, section), name)
        )
        settings = replace(settings, **{section: replace(getattr(settings, section), **{name: value})})
    return settings


@pytest.mark.parametrize(
    ("changes", "gpus", "shares"),
    [
        # Each has its own where there are enough.
        ({}, 4.0, False),
        ({}, 3.0, True),
        ({}, 2.0, True),
        ({"num_replicas": 1, "num_learners": 1}, 1.0, True),
        ({"colocate": True}, 8.0, True),
        ({"colocate": False, "num_gpus_per_learner": 0}, 2.0, False),
        ({"num_gpus_per_learner": 0}, 2.0, False),
        # On CPUs only who asks for it takes turns.
        ({}, 0.0, False),
        ({"colocate": True}, 0.0, True),
        ({"colocate": True, "device": "cpu"}, 4.0, True),
    ],
)
def test_replicas_and_learners_share_gpus_where_these_do_not_suffice(
    changes: dict[str, Any], gpus: float, shares: bool
) -> None:
    settings = sharing(**changes)
    on_gpu = resolve_device(settings, gpus)
    assert resolve_colocation(settings, gpus, on_gpu=on_gpu) is shares


@pytest.mark.parametrize(
    ("changes", "gpus"),
    [
        ({}, 1.0),
        ({"colocate": True}, 1.0),
        ({"colocate": False}, 3.0),
        ({"max_staleness": 1}, 2.0),
        ({"num_replicas": 1}, 2.0),
        ({"tensor_parallel_size": 2}, 4.0),
        ({"weight_transfer": "nccl"}, 2.0),
    ],
)
def test_what_cannot_share_gpus_needs_more_of_them(changes: dict[str, Any], gpus: float) -> None:
    with pytest.raises(ConfigError, match="the cluster has") as caught:
        resolve_device(sharing(**changes), gpus)
    assert ("resources.colocate" in str(caught.value)) is (changes.get("colocate") is not True and gpus > 1.0)


def test_reward_models_have_what_pairs_leave() -> None:
    settings = sharing(colocate=True)
    settings = replace(settings, rewards=replace(settings.rewards, functions=[RewardModelReward("rm", num_gpus=1.0)]))
    assert resolve_device(settings, 3.0)
    with pytest.raises(ConfigError, match="reward models need 1 GPUs, and replicas and learners leave 0"):
        resolve_device(settings, 2.0)


@pytest.mark.parametrize(("gpus", "shares"), [(5.0, False), (4.0, True), (3.0, True)])
def test_replicas_and_learners_share_gpus_where_reward_models_leave_too_few(gpus: float, shares: bool) -> None:
    settings = sharing()
    settings = replace(settings, rewards=replace(settings.rewards, functions=[RewardModelReward("rm", num_gpus=1.0)]))
    assert resolve_device(settings, gpus)
    assert resolve_colocation(settings, gpus, on_gpu=True) is shares


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


@pytest.fixture
def ray_is_running(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether Ray runs in this process: one entry; a session starts it, and may end it."""
    running: list[bool] = []
    monkeypatch.setattr(module, "_CONNECTION", RayConnection())
    monkeypatch.setattr("ray._private.auto_init_hook.enable_auto_connect", True)
    monkeypatch.setattr("rlhf_ray.algorithm.ray_connection.connect", lambda address, **_: running.append(True))
    monkeypatch.setattr("ray.is_initialized", lambda: bool(running))
    monkeypatch.setattr("ray.shutdown", running.clear)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0})
    monkeypatch.setattr(module, "node_resources", lambda: [{"CPU": 8.0}])
    return running


def test_a_run_that_does_not_fit_leaves_no_cluster_behind(ray_is_running: list[bool]) -> None:
    base = settings_of()
    with pytest.raises(ConfigError):
        RaySession(replace(base, learners=replace(base.learners, num_gpus_per_learner=1)))
    assert ray_is_running == []


def test_a_session_that_ends_leaves_ray_to_the_others(ray_is_running: list[bool]) -> None:
    first, second = RaySession(settings_of()), RaySession(settings_of())
    first.stop()
    first.stop()
    assert ray_is_running == [True]
    second.stop()
    assert ray_is_running == []


def test_a_reservation_that_does_not_end_keeps_no_cluster(ray_is_running: list[bool]) -> None:
    class Reserved:
        def end(self) -> None:
            raise TimeoutError("the supervisor does not answer")

    session = RaySession(settings_of())
    session.reservation = Reserved()  # type: ignore[assignment]
    session.stop()
    assert ray_is_running == []
