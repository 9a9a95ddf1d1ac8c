"""Weight sync, on a learner rank: what ends it where a replica died under a publication over NCCL."""

from __future__ import annotations

from rlhf_ray.errors import WeightSyncError

__all__ = ["ReplicaLostError"]


class ReplicaLostError(WeightSyncError):
    """A replica died while weights were sent to it; the learners start again and send them once more."""
