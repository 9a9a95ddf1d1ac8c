"""Learner side of a publication: gather sharded parameters, bucket by bucket, as bytes.

Consumes the policy's (sharded) parameters; produces ``(layout, pieces)`` on rank 0, a piece for each tensor. A gather
is a collective, so every rank must iterate to the end, in step; the other ranks receive ``None`` for the pieces and
keep no full tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt
import torch

from rlhf_ray.weight_sync.manifest import BucketLayout, TensorLayout

__all__ = ["DEFAULT_BUCKET_BYTES", "full_tensor", "gather_buckets", "on_mesh", "staged", "unpack_bucket"]

DEFAULT_BUCKET_BYTES = 256 * 1024 * 1024
# Views into a bucket must start on an address that every dtype can be read from.
_ALIGNMENT_BYTES = 64

ByteArray = npt.NDArray[np.uint8]


def gather_buckets(
    parameters: Iterable[tuple[str, torch.Tensor]],
    *,
    dtype: torch.dtype,
    keep: bool,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
) -> Iterator[tuple[BucketLayout, list[ByteArray] | None]]:
    """Yield the parameters in buckets of at most ``bucket_bytes`` (one tensor may exceed it alone).

    A piece may be the parameter's own memory: copy it before the parameter changes.

    Args:
        parameters: Checkpoint name and (sharded or full) tensor, in the same order on every rank.
        dtype: Type on the wire; floating-point tensors are cast to it before they are gathered.
        keep: Whether this rank wants the bytes (rank 0) or only takes part in the gathers.
        bucket_bytes: Size limit of a bucket in bytes.

    Yields:
        The layout, and the bytes of each of its tensors or ``None`` where ``keep`` is false.
    """
    tensors: list[TensorLayout] = []
    pieces: list[ByteArray] = []
    filled = 0
    for name, parameter in parameters:
        wire_dtype = dtype if parameter.dtype.is_floating_point else parameter.dtype
        size = parameter.numel() * wire_dtype.itemsize
        if tensors and filled + size > bucket_bytes:
            yield _layout(tensors), pieces if keep else None
            tensors, pieces, filled = [], [], 0
        full = full_tensor(parameter.detach(), wire_dtype)
        if keep:
            # Not numpy(): what may be the learner's own memory could never be freed in place again.
            flat = full.cpu().contiguous().view(-1).view(torch.uint8)
            pieces.append(np.asarray(np.from_dlpack(flat), dtype=np.uint8))
        tensors.append(
            TensorLayout(
                name=name,
                shape=tuple(parameter.shape),
                dtype=str(wire_dtype).removeprefix("torch."),
                offset_bytes=filled,
                size_bytes=size,
            )
        )
        filled += -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    if tensors:
        yield _layout(tensors), pieces if keep else None


def unpack_bucket(layout: BucketLayout, data: ByteArray) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and tensor for each entry of a bucket that lies flat in ``data``; the tensors are views of it."""
    flat = torch.from_numpy(data)
    for tensor in layout.tensors:
        piece = flat[tensor.offset_bytes : tensor.offset_bytes + tensor.size_bytes]
        yield tensor.name, piece.view(getattr(torch, tensor.dtype)).view(tensor.shape)


def full_tensor(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Gather a sharded tensor, a collective; one that is not sharded is returned, both in ``dtype`` if one is given."""
    tensor = on_mesh(tensor, dtype)
    gather = getattr(tensor, "full_tensor", None)
    return gather() if gather is not None else tensor


def on_mesh(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Cast this rank's shard, and move it to where its mesh communicates: an offloaded one is in CPU memory.

    A collective then carries the bytes of ``dtype``, over NCCL where there are GPUs. A cast after the gather would give
    the same numbers: it rounds each by itself.
    """
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None or any(one.is_partial() for one in tensor.placements):
        return tensor if dtype is None else tensor.to(dtype)
    dtype = dtype or tensor.dtype
    if (tensor.device.type, tensor.dtype) == (mesh.device_type, dtype):
        return tensor
    local = tensor.to_local().to(mesh.device_type, dtype)
    return type(tensor).from_local(
        local, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def staged(
    parameters: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype
) -> Callable[[], Iterator[tuple[str, torch.Tensor]]]:
    """Copy this rank's part of each tensor, in ``dtype``, to (pinned) host memory; the call gives them back, sharded.

    A collective where a tensor cannot be kept as it is.
    """
    copies = [(name, _host_copy(tensor.detach(), dtype)) for name, tensor in parameters]
    return lambda: ((name, copy()) for name, copy in copies)


def _host_copy(tensor: torch.Tensor, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None or any(one.is_partial() for one in tensor.placements):
        full = _on_host(full_tensor(tensor, dtype), dtype)
        return lambda: full
    host = _on_host(tensor.to_local(), dtype)
    kind, placements, shape, stride = type(tensor), tensor.placements, tensor.shape, tensor.stride()
    return lambda: kind.from_local(
        host.to(mesh.device_type), mesh, placements, run_check=False, shape=shape, stride=stride
    )


def _on_host(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=dtype, pin_memory=tensor.is_cuda).copy_(tensor)


def _layout(tensors: list[TensorLayout]) -> BucketLayout:
    size_bytes = tensors[-1].offset_bytes + tensors[-1].size_bytes
    return BucketLayout(size_bytes=size_bytes, tensors=tuple(tensors))
