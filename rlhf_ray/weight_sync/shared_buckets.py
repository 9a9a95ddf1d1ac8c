"""Replica side of a publication on CPUs: lays buckets out in memory that the engine's own process maps.

Consumes buckets as they come from the object store; produces what shared_memory_engine.py is told to map. The memory is
anonymous (``memfd_create``): it ends with the replica, however that ends, and a container's size of ``/dev/shm`` does
not bound it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from rlhf_ray.weight_sync.buckets import ByteArray
from rlhf_ray.weight_sync.manifest import BucketLayout

__all__ = ["SharedBuckets"]

# Memory that was written before takes new bytes in half the time; what is larger is given back between publications.
_KEPT_BYTES = 512 * 1024 * 1024


class SharedBuckets:
    """Memory for the buckets of one publication at a time."""

    def __init__(self) -> None:
        self._files: list[int] = []
        self._held_bytes = 0

    def write(self, layouts: Sequence[BucketLayout], buckets: Sequence[Sequence[ByteArray]]) -> list[dict[str, Any]]:
        """Lay buckets out flat; returns how each is described to the engine.

        What was written before must not be in use any more.
        """
        while len(self._files) < len(layouts):
            self._files.append(os.memfd_create("rlhf_ray-weights"))
        updates = []
        for file, layout, pieces in zip(self._files, layouts, buckets, strict=False):
            for tensor, piece in zip(layout.tensors, pieces, strict=True):
                _write(file, piece, tensor.offset_bytes)
            updates.append(_update_info(layout, f"/proc/{os.getpid()}/fd/{file}"))
        self._held_bytes = max(self._held_bytes, sum(layout.size_bytes for layout in layouts))
        return updates

    def release(self) -> None:
        """The engine has read what was written: give the memory back if it is large."""
        if self._held_bytes > _KEPT_BYTES:
            self._held_bytes = 0
            for file in self._files:
                os.ftruncate(file, 0)


def _write(file: int, piece: ByteArray, offset: int) -> None:
    left: memoryview = piece.data
    while len(left):  # Linux takes at most 2 GiB at once.
        written = os.pwrite(file, left, offset)
        left, offset = left[written:], offset + written


def _update_info(layout: BucketLayout, path: str) -> dict[str, Any]:
    """A bucket as ``SharedMemoryUpdateInfo`` has it, in plain types."""
    tensors = [(t.name, list(t.shape), t.dtype, t.offset_bytes, t.size_bytes) for t in layout.tensors]
    return {"path": path, "size_bytes": layout.size_bytes, "tensors": tensors}
