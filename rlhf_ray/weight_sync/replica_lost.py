"""Weight sync: what is known of a replica that could not load weights, and what ends a learner that lost one."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_ray.errors import WeightSyncError

__all__ = ["ReplicaFailure", "ReplicaLostError"]


class ReplicaLostError(WeightSyncError):
    """A replica died while weights were sent to it; the learners start again and send them once more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaFailure:
    """Why a replica could not load weights; told to the bridge, since the replica itself may end with it."""

    told_by: str
    """A replica, or the learner that waited for it."""
    message: str
    """The error in one line; of an engine that died, what its log says."""
    is_new: bool
    """Whether it was starting, in the place of one that had died."""
