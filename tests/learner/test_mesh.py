from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from rlhf_ray.learner import mesh as module
from rlhf_ray.learner.mesh import LearnerMesh

Ranks = tuple[int, ...]


@pytest.fixture
def six_ranks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Ranks, ...]]:
    """Groups that a rank of six has asked for, one entry a call."""
    asked: list[tuple[Ranks, ...]] = []

    def new_subgroups(of_groups: list[list[int]]) -> tuple[Any, Any]:
        asked.append(tuple(map(tuple, of_groups)))
        return asked[-1], None

    monkeypatch.setattr(dist, "get_world_size", lambda: 6)
    monkeypatch.setattr(dist, "new_subgroups_by_enumeration", new_subgroups)
    monkeypatch.setattr(module, "init_device_mesh", lambda device_type, shape: shape)
    return asked


@pytest.mark.parametrize(
    ("size", "sequence", "data"),
    [
        (2, ((0, 1), (2, 3), (4, 5)), ((0, 2, 4), (1, 3, 5))),
        (3, ((0, 1, 2), (3, 4, 5)), ((0, 3), (1, 4), (2, 5))),
        (6, ((0, 1, 2, 3, 4, 5),), ((0,), (1,), (2,), (3,), (4,), (5,))),
    ],
)
def test_neighbors_read_the_same_sequences(size: int, sequence: Any, data: Any, six_ranks: Any) -> None:
    mesh = LearnerMesh.of("cpu", size)
    assert (mesh.sequence, mesh.data) == (sequence, data)
    assert mesh.ranks == (6,)  # Models are sharded over all of them.


@pytest.mark.usefixtures("one_rank")
def test_without_slices_there_are_no_further_groups(six_ranks: Any) -> None:
    mesh = LearnerMesh.of("cpu", 1)
    assert mesh.sequence is None
    assert mesh.data is dist.group.WORLD
    assert six_ranks == []
    mesh.close()
    assert dist.is_initialized()
