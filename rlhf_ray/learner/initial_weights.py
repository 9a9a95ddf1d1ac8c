"""Brings a model that one rank has read to the shards of all, so that no node's memory holds it twice.

A model is sharded while its parameters have no memory. The reader keeps the whole weights meanwhile, then sends each
rank the rows that it owns, parameter by parameter in messages of bounded size, and drops what it has sent.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["InitialWeights", "local_part", "names_by_parameter", "outline", "reads_weights", "without_weights"]

_MESSAGE_NUMBERS = 2**24
"""Of a message: a copy of a whole shard, at both ends of it, might not fit next to the model."""


def reads_weights() -> bool:
    """Whether this rank reads models for all ranks."""
    return bool(dist.get_rank() == 0)


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
    """The weights of a model, taken out of it until it is sharded; a collective of all ranks.

    Args:
        model: The same on all ranks, with its weights on the one that reads. Afterwards its parameters are on the meta
            device, tied as they were on the rank that read.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._whole = {name: parameter.detach() for name, parameter in model.named_parameters()}
        # transformers also ties what is equal in the files, which the reader alone has seen.
        outlines = [[(tied, _empty(model.get_parameter(tied[0]))) for tied in names_by_parameter(model)]]
        dist.broadcast_object_list(outlines)
        self._names = [tied[0] for tied, _ in outlines[0]]
        for tied, parameter in outlines[0]:
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
            whole = self._whole.pop(name) if reads_weights() else None
            _scatter_rows(whole, local_part(model.get_parameter(name)))
        for buffer in model.buffers():
            whole = buffer.cpu().contiguous()
            dist.broadcast(whole, 0)
            buffer.copy_(whole)


def names_by_parameter(model: PreTrainedModel) -> list[list[str]]:
    """The names of each parameter: several where it is tied."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that may be sharded."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _scatter_rows(whole: torch.Tensor | None, part: torch.Tensor) -> None:
    """Fill the parts of all ranks with rows of ``whole``, which the reader alone has."""
    rows = max(1, _MESSAGE_NUMBERS // max(1, math.prod(part.shape[1:])))
    if whole is None:
        for piece in part.split(rows) if len(part) else ():
            received = torch.empty(piece.shape, dtype=piece.dtype)
            dist.recv(received, 0)
            piece.copy_(received)
        return
    own, *others = whole.chunk(dist.get_world_size())
    part.copy_(own)
    for rank, theirs in enumerate(others, start=1):
        for piece in theirs.split(rows):
            dist.send(piece.contiguous(), rank)


def _empty(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
