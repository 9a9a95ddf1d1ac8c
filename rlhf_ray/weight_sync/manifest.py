"""What a published policy looks like on its way from the learners to the replicas.

A publication is a list of buckets of tensors plus this manifest, which says which tensors a bucket holds, and where
each lies when the bucket is laid out flat. A weight that is tied to another is sent once, under the names of both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from rlhf_ray.errors import WeightSyncError

__all__ = [
    "BucketLayout",
    "ReplicaFailure",
    "ReplicaLostError",
    "TensorLayout",
    "WeightManifest",
    "joined_names",
    "under_each_name",
]


class ReplicaLostError(WeightSyncError):
    """A replica died while weights were sent to it; the learners are restarted and send them again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaFailure:
    """Why a replica could not load weights; told to the bridge, since the replica itself may end with it."""

    told_by: str
    """A replica, or the learner that waited for it."""
    message: str
    """The error in one line; of an engine that died, what its log says."""
    is_new: bool
    """Whether it was starting, in the place of one that had died."""


_Tensor = TypeVar("_Tensor")

# No module's name holds it.
_AND = "="


def joined_names(names: Iterable[str]) -> str:
    """The name under which a weight with several checkpoint names is sent."""
    return _AND.join(names)


def under_each_name(weights: Iterable[tuple[str, _Tensor]]) -> Iterator[tuple[str, _Tensor]]:
    """Yield what was sent under joined names under each of them."""
    return ((name, tensor) for names, tensor in weights for name in names.split(_AND))


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorLayout:
    """Where one tensor lies in its bucket."""

    name: str
    """Checkpoint name, as in the Hugging Face state dict; of a tied weight all of them (:func:`joined_names`)."""
    shape: tuple[int, ...]
    dtype: str
    """``torch`` type name, for example ``float32``."""
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketLayout:
    """One flat buffer of tensors."""

    size_bytes: int
    tensors: tuple[TensorLayout, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightManifest:
    """All buckets of one policy version."""

    version: int
    publication: str
    """Unique; a restored run publishes a version that a replica may have seen with other weights."""
    buckets: tuple[BucketLayout, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes over all buckets."""
        return sum(bucket.size_bytes for bucket in self.buckets)
