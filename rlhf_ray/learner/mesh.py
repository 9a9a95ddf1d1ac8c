"""Which learner ranks take part in which collective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

__all__ = ["LearnerMesh", "gather_objects"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerMesh:
    """The groups that a rank belongs to: its share of the data, and its slice of the sequences.

    Neighbors, ``[0, 1], [2, 3], ...`` with two ranks per sequence, hold the same sequences and each reads a slice of
    them. What is counted once per sequence is merged over ``data``; what concerns weights or refusals, over all ranks.
    """

    ranks: DeviceMesh
    """All ranks, flat: models are sharded over it."""
    data: dist.ProcessGroup
    """Ranks with the same place among their neighbors: one for each share of the batch."""
    sequence: dist.ProcessGroup | None
    """Ranks that hold the same sequences, in the order of their slices; ``None`` where each rank reads whole ones."""

    @classmethod
    def of(cls, device_type: str, sequence_parallel: int) -> LearnerMesh:
        """Make the groups of ``sequence_parallel`` ranks per sequence; a collective of all ranks."""
        world_size = dist.get_world_size()
        ranks = init_device_mesh(device_type, (world_size,))
        if sequence_parallel == 1:
            return cls(ranks=ranks, data=dist.group.WORLD, sequence=None)
        neighbors = [list(range(first, first + sequence_parallel)) for first in range(0, world_size, sequence_parallel)]
        # Groups of their own, where a device mesh would hand out that of all ranks, which must not be closed.
        sequence, _ = dist.new_subgroups_by_enumeration(neighbors)
        data, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in zip(*neighbors, strict=True)])
        return cls(ranks=ranks, data=data, sequence=sequence)

    def close(self) -> None:
        """Give back the groups that were made for it."""
        if self.sequence is not None:
            dist.destroy_process_group(self.sequence)
            dist.destroy_process_group(self.data)


def gather_objects(mine: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """What each rank of a group has, in their order; ``None``: of all ranks."""
    gathered = [mine] * dist.get_world_size(group)
    dist.all_gather_object(gathered, mine, group=group)
    return gathered
