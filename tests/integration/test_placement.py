"""Learners and replicas on a cluster of two pretended nodes with four pretended GPUs each: no engine runs here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

from rlhf_ray.errors import LearnerError
from rlhf_ray.learner.remote import train_run
from rlhf_ray.learner.remote.group import LearnerGroup
from rlhf_ray.rollouts import app as app_module
from rlhf_ray.rollouts.app import RolloutApp
from rlhf_ray.rollouts.engine import EngineSpec

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_session_in_this_process")]


@pytest.fixture
def two_nodes(fake_gpus: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    with fake_gpus():
        cluster = Cluster(True, head_node_args={"num_cpus": 8, "num_gpus": 4, "include_dashboard": False})
        cluster.add_node(num_cpus=8, num_gpus=4)
        ray.init(address=cluster.address, namespace="rlhf_ray", log_to_driver=False)
    yield
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def parts(
    two_nodes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[float], tuple[LearnerGroup, RolloutApp]]]:
    """Four learners that train nothing and four replicas that sample nothing, on a GPU each; neither is started."""
    made: list[Any] = []

    def loop(config: dict[str, Any]) -> None:
        ray.get(config["bridge"].next_command.remote(ray.train.get_context().get_world_rank(), "group", 0, 120.0))

    class Replica:
        def __init__(self, spec: Any, bridge: Any) -> None:
            self.node = ray.get_runtime_context().get_node_id()

    def trainer(self: LearnerGroup) -> Any:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

        from rlhf_ray.learner.remote.ray_trainer import announce_controller

        each = {"CPU": 0.1, "GPU": 1}
        return DataParallelTrainer(
            loop,
            train_loop_config={"bridge": self.bridge},
            scaling_config=ScalingConfig(num_workers=4, use_gpu=True, resources_per_worker=each),
            run_config=RunConfig(
                name="placement", storage_path=str(tmp_path), callbacks=[announce_controller(self.bridge)]
            ),
        )

    monkeypatch.setattr(LearnerGroup, "_trainer", trainer)
    monkeypatch.setattr(train_run, "STOP_TIMEOUT_S", 10.0)
    monkeypatch.setattr(app_module, "RolloutReplica", Replica)

    def make(startup_timeout_s: float) -> tuple[LearnerGroup, RolloutApp]:
        learner_spec: Any = SimpleNamespace(on_gpu=True, colocated=False)
        learners = LearnerGroup(
            spec=learner_spec,
            run_id="run",
            num_learners=4,
            num_cpus=0.1,
            storage_path=str(tmp_path),
            startup_timeout_s=startup_timeout_s,
            update_timeout_s=60.0,
            max_restarts=0,
            state_interval=0,
            tensor_parallel_size=1,
            num_replicas=4,
        )
        engine = EngineSpec(
            engine_args={}, env={}, eos_token_ids=(), weight_transfer="nccl", tensor_parallel_size=1, on_gpu=True
        )
        app = RolloutApp(
            run_id="run",
            spec=engine,
            num_replicas=4,
            num_cpus=0.1,
            bridge=learners.bridge,
            startup_timeout_s=60.0,
            ray_ends=False,
        )
        made.extend((app, learners))
        return learners, app

    yield make
    for each in made:
        each.stop()


def nodes_of_learners(learners: LearnerGroup) -> list[str]:
    group = ray.get(learners.bridge.placement_group.remote())
    return list(placement_group_table(group)["bundles_to_node_id"].values())


def test_learners_are_on_one_node_and_replicas_on_what_is_left(parts: Callable[..., Any]) -> None:
    learners, app = parts(60.0)
    learners.start()
    app.start(after=learners.wait_placed)
    app.wait_ready()
    nodes = nodes_of_learners(learners)
    assert (len(nodes), len(set(nodes))) == (4, 1)


def test_learners_without_room_end_the_start_with_an_error_of_their_own(parts: Callable[..., Any]) -> None:
    """And no replica is begun, which would wait for GPUs too."""
    holders = [ray.remote(num_gpus=1)(Holder).remote() for _ in range(5)]
    ray.get([holder.ready.remote() for holder in holders])
    learners, app = parts(8.0)
    learners.start()
    started = time.monotonic()
    app.start(after=learners.wait_placed)
    with pytest.raises(LearnerError, match=r"no room for 4 of 0.1 CPUs and 1 GPU each; .* 3 GPUs are free"):
        app.wait_ready()
    assert time.monotonic() - started < 120
    assert not app._begun


class Holder:
    def ready(self) -> None:
        pass
