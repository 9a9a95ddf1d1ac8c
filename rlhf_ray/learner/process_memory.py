"""Has the C library return the memory of freed tensors to the machine.

glibc raises the size from which it maps memory by itself, up to 32 MiB, with each mapped block that is freed. Weights,
gradients and activations then share one heap, whose holes stay with the process: 1.4 of 5.4 GiB for 135M parameters.
"""

from __future__ import annotations

import ctypes
import os

__all__ = ["return_freed_tensors"]

# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MAPPED_BYTES = 2**20
_KEPT_BYTES = 2**26
"""At the heap's end: giving that back for each small tensor that is freed would cost time."""


def return_freed_tensors() -> None:
    """Map tensors from 1 MiB on by themselves, unless ``MALLOC_MMAP_THRESHOLD_`` says otherwise."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # Not every C library has it.
    if mallopt is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
