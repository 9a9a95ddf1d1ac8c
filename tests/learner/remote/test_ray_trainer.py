from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from ray.exceptions import ActorDiedError
from ray.train import FailureConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup
from ray.train.v2.api.exceptions import ControllerError

from rlhf_ray.learner.remote.ray_trainer import RestartPolicy, _EndLeftovers, announce_placement_groups


@pytest.mark.parametrize(
    ("error", "is_death"),
    [
        (ActorDiedError(), True),
        (dist.DistNetworkError("peer"), True),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:538] Connection closed by peer"), True),
        (RuntimeError("no such model"), False),
    ],
)
def test_a_worker_that_dies_while_the_group_starts_costs_a_start(error: Exception, is_death: bool) -> None:
    policy = RestartPolicy(FailureConfig(max_failures=2))
    expected = [FailureDecision.RETRY] * 2 if is_death else []
    decisions = [policy.make_decision(ControllerError(error)) for _ in range(3)]
    assert decisions[: len(expected) + 1] == [*expected, FailureDecision.RAISE]


def test_what_ray_train_starts_again_by_itself_is_not_counted() -> None:
    policy = RestartPolicy(FailureConfig(max_failures=0))
    waiting = ControllerError(WorkerGroupStartupTimeoutError(num_workers=2))
    assert [policy.make_decision(waiting) for _ in range(3)] == [FailureDecision.RETRY] * 3


def test_what_a_failed_start_left_is_ended_before_the_next_one() -> None:
    ended: list[str] = []

    def group(name: str) -> Any:
        state = SimpleNamespace(shutdown=lambda: ended.append(name))
        return SimpleNamespace(get_worker_group_state=lambda: state)

    callback = _EndLeftovers()
    callback.before_worker_group_start(None)
    callback.after_worker_group_start(group("sound"))
    callback.after_worker_group_shutdown(None)
    callback.before_worker_group_start(None)
    assert ended == []
    callback.after_worker_group_start(group("half started"))
    callback.before_worker_group_start(None)
    assert ended == ["half started"]


def test_a_placement_group_is_known_before_workers_start_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    handle = SimpleNamespace(placement_group="group")
    monkeypatch.setattr(WorkerGroup, "_create_placement_group", lambda self, scaling, context: handle)
    monkeypatch.setattr("ray.get", lambda call: call)
    asked = SimpleNamespace(remote=lambda: told.append("asked"))
    announce_placement_groups(
        SimpleNamespace(set_placement_group=SimpleNamespace(remote=told.append), placement_group=asked)
    )
    assert WorkerGroup._create_placement_group(object(), "scaling", "context") is handle
    assert told == ["group", "asked"]
