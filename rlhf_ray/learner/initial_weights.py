"""Brings a model that one rank of each node has read to the shards of all, so that no node's memory holds it twice.

A model is sharded while its parameters have no memory. The reader keeps the whole weights meanwhile, then sends each
rank of its node the rows that it owns, parameter by parameter, and drops what it has sent.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["InitialWeights", "local_part", "outline", "reads_weights", "without_weights"]

_MESSAGE_NUMBERS = 2**24
_CPU = torch.device("cpu")


def reads_weights() -> bool:
    """Whether this rank reads models for all ranks of its node; where ``LOCAL_RANK`` is not set, there is one node."""
    return bool(_reader() == dist.get_rank())


@contextmanager
def without_weights() -> Iterator[None]:
    """Within, ``from_pretrained`` takes names and shapes from files: their tensors are on the meta device."""
    from transformers import core_model_loading

    def shape_alone(stored: Any, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        shape = stored.get_shape() if hasattr(stored, "get_shape") else stored.shape
        return torch.empty(shape, dtype=dtype, device="meta")

    # transformers' own way, a device map, needs the package accelerate and reads every tensor all the same. A version
    # that reads by another name reads the weights too, which are then dropped.
    read = getattr(core_model_loading, "_materialize_copy", None)
    core_model_loading._materialize_copy = shape_alone
    try:
        yield
    finally:
        core_model_loading._materialize_copy = read


def outline(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model that is not sharded yet, its parameters without memory."""
    return copy.deepcopy(model, {id(parameter): _empty(parameter) for parameter in model.parameters()})


class InitialWeights:
    """The weights of a model, taken out of it until it is sharded; a collective of each node's ranks.

    Args:
        model: The same on all ranks, with its weights on those that read. Afterwards its parameters are on the meta
            device, tied as they were on the rank that read.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._whole = {name: parameter.detach() for name, parameter in model.named_parameters()}
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        # transformers also ties what is equal in the files, which the reader alone has seen.
        outlines = _from_reader([(tied, _empty(model.get_parameter(tied[0]))) for tied in names.values()])
        self._names = [tied[0] for tied, _ in outlines]
        for tied, parameter in outlines:
            for name in tied:
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, parameter)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def fill(
        self,
        model: PreTrainedModel,
        device: str,
        *,
        offload: bool = False,
        source: PreTrainedModel | None = None,
    ) -> None:
        """Give the shards of the model memory and numbers, and all ranks the reader's buffers.

        Args:
            model: The model, sharded by rows over all ranks.
            device: The type of device where it computes.
            offload: Whether its shards are in CPU memory.
            source: A model that is sharded alike, to copy from instead; its types may differ.
        """

        def allocated(tensor: torch.Tensor) -> torch.Tensor:
            where = "cpu" if offload and isinstance(tensor, DTensor) else device
            return torch.empty_like(tensor, device=where) if tensor.is_meta else tensor

        model._apply(allocated)
        if source is not None:
            targets = itertools.chain(model.parameters(), model.buffers())
            for target, tensor in zip(targets, itertools.chain(source.parameters(), source.buffers()), strict=True):
                local_part(target).copy_(local_part(tensor))
            return
        for name in self._names:
            whole = self._whole.pop(name, None)
            rows = whole.chunk(dist.get_world_size()) if whole is not None and reads_weights() else ()
            _deal(local_part(model.get_parameter(name)), dict(enumerate(rows)))
        for buffer in model.buffers():
            whole = buffer.to(_CPU)
            _deal(buffer, dict.fromkeys(range(dist.get_world_size()), whole))


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that may be sharded."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _deal(target: torch.Tensor, parts: Mapping[int, torch.Tensor]) -> None:
    """Fill ``target`` with this rank's part, and those of the node's other ranks; the reader has all parts by rank."""
    if reads_weights():
        sends = [
            dist.isend(piece, rank) for rank in _listeners() if rank in parts for piece in _pieces(parts[rank].cpu())
        ]
        part = parts.get(dist.get_rank())
        if part is not None and part.data_ptr() != target.data_ptr():
            target.copy_(part)
        for send in sends:
            send.wait()
        return
    # In the order of its numbers, whatever that is in memory: pieces of another one would be copies.
    filled = target if target.is_contiguous() else torch.empty_like(target, memory_format=torch.contiguous_format)
    for piece in _pieces(filled):
        received = piece if piece.device == _CPU else torch.empty_like(piece, device=_CPU)
        dist.recv(received, _reader())
        piece.copy_(received)
    if filled is not target:
        target.copy_(filled)


def _pieces(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What is sent of a tensor at once, as views."""
    return tensor.contiguous().view(-1).split(_MESSAGE_NUMBERS) if tensor.numel() else ()


def _from_reader(value: Any) -> Any:
    values = [value]
    if reads_weights():
        for rank in _listeners():
            dist.send_object_list(values, rank)
    else:
        dist.recv_object_list(values, _reader())
    return values[0]


def _reader() -> int:
    """Ray Train numbers the ranks of a node in a row."""
    rank: int = dist.get_rank()
    return rank - int(os.environ.get("LOCAL_RANK", rank))


def _listeners() -> range:
    first = _reader()
    return range(first + 1, first + int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())))


def _empty(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
