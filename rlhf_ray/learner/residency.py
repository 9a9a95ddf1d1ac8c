"""Moves what a rank holds on its device to host memory and back, in place: tensors stay the objects that they are.

A storage is copied and resized to nothing, so DTensors, FSDP's padded views, tied weights and the keys of an
optimizer's state all outlive it. It runs the same on CPUs.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator

import torch
from torch.distributed.tensor import DTensor

__all__ = ["Residency"]

# PyTorch rounds pinned memory up to a power of two: by itself a tensor would take up to twice its size.
_SLAB_BYTES = 2**26
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
        self._away: list[tuple[torch.UntypedStorage, int]] = []
        self._places: dict[int, int] = {}
        """Where in host memory the last :meth:`offload` took a storage."""
        # Pinning memory is slow: it is kept.
        self._slabs: list[torch.Tensor] = []
        self.is_offloaded = False

    def offload(self, tensors: Iterable[torch.Tensor]) -> None:
        """Copy this rank's part of all tensors to (pinned) host memory and free them on the device.

        It is the same memory each time, and :meth:`onload` leaves it as it is.
        """
        local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
        storages = {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in local)}
        storages.pop(0, None)  # Empty ones.
        # On CPUs numpy may read one.
        self._away = [(one, one.nbytes()) for one in filter(torch.UntypedStorage.resizable, storages.values())]
        places = itertools.accumulate((size for _, size in self._away), initial=0)
        self._places = {storage._cdata: place for (storage, _), place in zip(self._away, places, strict=False)}
        for on_device, on_host in self._pieces():
            on_host.copy_(on_device, non_blocking=True)
        self._synchronize()
        for storage, _ in self._away:
            storage.resize_(0)
        self.is_offloaded = True
        if self._on_gpu:
            torch.cuda.empty_cache()

    def onload(self) -> None:
        """Bring all of them back."""
        ends_at = time.monotonic() + _PATIENCE_S
        for storage, size in self._away:
            _allocate(storage, size, ends_at)
        for on_device, on_host in self._pieces():
            on_device.copy_(on_host, non_blocking=True)
        self._synchronize()
        self._away.clear()
        self.is_offloaded = False

    def bytes_of(self, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
        """The bytes of a tensor without shards as the last :meth:`offload` left them in host memory, piece by piece.

        Its own memory, where that was not taken. Valid until the next :meth:`offload`.
        """
        storage = tensor.untyped_storage()
        place = self._places.get(storage._cdata)
        if place is None:
            yield tensor.contiguous().view(-1).view(torch.uint8)
        elif tensor.is_contiguous():
            yield from self._on_host(place + tensor.storage_offset() * tensor.itemsize, tensor.nbytes)
        else:
            end = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
            start, size = place + tensor.storage_offset() * tensor.itemsize, end * tensor.itemsize
            spread = torch.cat(list(self._on_host(start, size))).view(tensor.dtype)
            yield spread.as_strided(tensor.shape, tensor.stride()).contiguous().view(-1).view(torch.uint8)

    def _pieces(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What is away, piece by piece: its bytes on the device, and their place in host memory."""
        for storage, size in self._away:
            left = _bytes(storage)
            for on_host in self._on_host(self._places[storage._cdata], size):
                yield left[: on_host.nbytes], on_host
                left = left[on_host.nbytes :]

    def _on_host(self, place: int, size: int) -> Iterator[torch.Tensor]:
        while size:
            slab, start = divmod(place, _SLAB_BYTES)
            if slab == len(self._slabs):
                self._slabs.append(torch.empty(_SLAB_BYTES, dtype=torch.uint8, pin_memory=self._on_gpu))
            length = min(size, _SLAB_BYTES - start)
            yield self._slabs[slab][start : start + length]
            place, size = place + length, size - length

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
