"""What a published policy looks like on its way from the learners to the replicas.

A publication is a list of buckets of tensors plus this manifest, which says which tensors a bucket holds, and where
each lies when the bucket is laid out flat.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BucketLayout", "TensorLayout", "WeightManifest"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorLayout:
    """Where one tensor lies in its bucket."""

    name: str
    """Checkpoint name, as in the Hugging Face state dict."""
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
