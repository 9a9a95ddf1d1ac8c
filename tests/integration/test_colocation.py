"""Replicas and learners that share GPUs: how Ray places them, on fake GPUs, and turns on the real stack."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from ray.util import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from ray.util.state import list_actors
from safetensors.torch import load_file

from rlhf_ray import PPOConfig
from rlhf_ray.algorithm.algorithm import Algorithm
from rlhf_ray.errors import ConfigError
from rlhf_ray.learner.remote import turns
from rlhf_ray.learner.remote.train_run import rank_resources
from rlhf_ray.learner.remote.turns import Place, check_pairing
from rlhf_ray.reporting.metrics import flatten
from rlhf_ray.rollouts.app import replica_options

pytestmark = pytest.mark.engine

LEARNER = "ray::RayTrainWorker"
SPEC: Any = SimpleNamespace(on_gpu=True, colocated=True, tensor_parallel_size=1, env={})
GPUS = 4
FEW_CPUS = 0.01


@ray.remote
class Process:
    """A replica or a rank, as far as Ray's placement goes."""

    def place(self) -> Place:
        return ray.get_runtime_context().get_node_id(), ",".join(map(str, ray.get_gpu_ids()))


class Placed:
    """Replicas as Serve places them, ranks as Ray Train does: in a group of bundles."""

    def __init__(self) -> None:
        self.replicas = [self.start_replica() for _ in range(GPUS)]
        self.wait(self.replicas)
        self.start_ranks()

    def start_replica(self) -> Any:
        options = dict(replica_options(SPEC, FEW_CPUS, {})["ray_actor_options"])
        return Process.options(**options, scheduling_strategy="SPREAD").remote()

    def start_ranks(self) -> None:
        bundle = rank_resources(SPEC, FEW_CPUS)
        self._group = placement_group([bundle] * GPUS, strategy="PACK")
        ray.get(self._group.ready(), timeout=60)
        self.ranks = [
            Process.options(
                num_cpus=bundle["CPU"],
                num_gpus=bundle["GPU"],
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index),
            ).remote()
            for index in range(GPUS)
        ]

    def end_ranks(self) -> None:
        remove_placement_group(self._group)

    @staticmethod
    def wait(processes: list[Any]) -> list[Place]:
        return list(ray.get([process.place.remote() for process in processes], timeout=60))

    def places(self) -> tuple[dict[str, Place], dict[int, Place]]:
        replicas, ranks = self.wait(self.replicas), self.wait(self.ranks)
        return {str(index): place for index, place in enumerate(replicas)}, dict(enumerate(ranks))


@pytest.fixture(scope="module")
def gpus(no_session_in_this_process: None, fake_gpus: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    with fake_gpus():
        ray.init(num_cpus=2, num_gpus=GPUS, log_to_driver=False)
    yield
    ray.shutdown()


def test_replicas_and_learners_are_placed_in_pairs_and_stay_so(gpus: None) -> None:
    placed = Placed()
    check_pairing(*placed.places())
    # One replica is started again, then the learners are, then both.
    for deaths in ((1,), (), (2,)):
        for number in deaths:
            ray.kill(placed.replicas[number])
        if deaths != (1,):
            placed.end_ranks()
        for number in deaths:
            placed.replicas[number] = placed.start_replica()
        placed.wait(placed.replicas)
        if deaths != (1,):
            placed.start_ranks()
        check_pairing(*placed.places())
    placed.end_ranks()
    for replica in placed.replicas:
        ray.kill(replica)


def test_halves_are_not_placed_in_pairs_which_is_an_error(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("rlhf_ray.rollouts.app.REPLICA_SHARE", "rlhf_ray.learner.remote.train_run.LEARNER_SHARE"):
        monkeypatch.setattr(module, 0.5)
    assert turns.REPLICA_SHARE + turns.LEARNER_SHARE == 1.0
    placed = Placed()
    with pytest.raises(ConfigError, match="not placed in pairs"):
        check_pairing(*placed.places())


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """What a run computed, without what it measured of itself."""
    computed = ("rollouts/", "rewards/", "learner/", "evaluation/")
    measured = ("tokens_per_s", "idle_fraction")
    return {
        name: value
        for name, value in flatten(result).items()
        if name.startswith(computed) and not name.endswith(measured)
    }


def run(config: PPOConfig, folder: Path, hurt: Callable[[Algorithm, int], None]) -> list[dict[str, Any]]:
    """Three iterations and what else reads the learners' weights; what they computed."""
    algorithm = config.evaluation(at_start=True, interval=1).checkpointing(interval=2).build_algo()
    try:
        results = []
        for number in range(3):
            hurt(algorithm, number)
            results.append(figures(algorithm.train()))
        algorithm.export_hf(folder)
        checkpoint = algorithm.save_to_path(folder / "checkpoint")
        results.append(figures(algorithm.train()))
        algorithm.restore_from_path(checkpoint)
        again = figures(algorithm.train())
        assert again == results[-1]
        return results
    finally:
        algorithm.stop()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_turns_change_no_bit_whatever_dies(
    cluster: None,
    small: Callable[[Path], PPOConfig],
    send: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def kill_replica() -> None:
        victim = next(each for each in list_actors(filters=[("state", "=", "ALIVE")]) if "RolloutReplica" in each.name)
        os.kill(victim.pid, signal.SIGKILL)

    def hurt(algorithm: Algorithm, number: int) -> None:
        """First a replica dies while learners compute, then a learner while replicas sample."""
        learners = algorithm._running().learners
        update = learners.update

        def update_and_kill(*arguments: Any, **options: Any) -> Any:
            threading.Timer(0.1, kill_replica).start()
            return update(*arguments, **options)

        monkeypatch.undo()
        if number == 1:
            monkeypatch.setattr(learners, "update", update_and_kill)
        if number == 2:
            send(LEARNER)

    separate = run(small(tmp_path / "separate"), tmp_path / "a", lambda *_: None)
    in_turns = run(small(tmp_path / "turns").resources(colocate=True), tmp_path / "b", hurt)
    assert in_turns == separate
    for file in ("model.safetensors", "critic/model.safetensors"):
        ours, theirs = load_file(tmp_path / "a" / file), load_file(tmp_path / "b" / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
