"""Moves what a rank holds on its device to host memory and back, in place: tensors stay the objects that they are.

A storage is copied and resized to nothing, so DTensors, FSDP's padded views, tied weights and the keys of an
optimizer's state all outlive it. It runs the same on CPUs.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch.distributed.tensor import DTensor

__all__ = ["Residency"]

# An engine that was killed a moment ago may not have given its memory back yet.
_PATIENCE_S = 30.0
_RETRY_S = 0.5


class Residency:
    """The storages of some tensors, on their device or in host memory.

    Args:
        device: Theirs.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._away: list[tuple[torch.UntypedStorage, torch.Tensor]] = []
        # Pinning memory is slow: the buffers are kept, by size.
        self._spare: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        self.is_offloaded = False

    def offload(self, tensors: Iterable[torch.Tensor]) -> None:
        """Copy this rank's part of all tensors to (pinned) host memory and free them on the device."""
        local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
        storages = {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in local)}
        storages.pop(0, None)  # Empty ones.
        for storage in filter(torch.UntypedStorage.resizable, storages.values()):  # On CPUs numpy may read one.
            self._away.append((storage, self._buffer(storage).copy_(_bytes(storage), non_blocking=True)))
        self._synchronize()
        for storage, _ in self._away:
            storage.resize_(0)
        self._spare.clear()
        self.is_offloaded = True
        if self._on_gpu:
            torch.cuda.empty_cache()

    def onload(self) -> None:
        """Bring all of them back."""
        ends_at = time.monotonic() + _PATIENCE_S
        for storage, host in self._away:
            _allocate(storage, len(host), ends_at)
            _bytes(storage).copy_(host, non_blocking=True)
        self._synchronize()
        for _, host in self._away:
            self._spare[len(host)].append(host)
        self._away.clear()
        self.is_offloaded = False

    def _buffer(self, storage: torch.UntypedStorage) -> torch.Tensor:
        spare = self._spare[storage.nbytes()]
        return spare.pop() if spare else torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=self._on_gpu)

    def _synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _allocate(storage: torch.UntypedStorage, size_bytes: int, ends_at: float) -> None:
    while True:
        try:
            storage.resize_(size_bytes)
            return
        except torch.OutOfMemoryError:
            if time.monotonic() > ends_at:
                raise
            time.sleep(_RETRY_S)
