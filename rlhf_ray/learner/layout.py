"""Lays a microbatch out as the model reads it, and reads per-token results back.

Two layouts, one interface: rows padded on the right without a mask (a causal model never looks at what comes after),
or one packed row whose positions restart at 0, with its sequences' cumulative lengths (attention that reads these keeps
them apart). Results come back as ``[B, T]``: row b holds the T completion tokens of sequence b from the left; ``mask``
says which are real.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.types import BoolArray, Int32Array

__all__ = ["Microbatch", "lay_out", "packed_lengths"]

_Integers = npt.NDArray[np.int32] | npt.NDArray[np.int64]
_Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """Tensors of one forward pass on the learner's device."""

    rows: torch.Tensor
    """``[B]`` indices of its sequences in the rank's batch."""
    input_ids: torch.Tensor
    """``[B, L]`` padded or ``[1, sum(L)]`` packed."""
    position_ids: torch.Tensor | None
    """Like ``input_ids`` when packed, restarting at 0; ``None`` when padded."""
    cu_seq_lens: torch.Tensor | None
    """``[B + 1]`` int32, where each sequence of a packed row begins, and the row's end; ``None`` when padded."""
    max_length: int
    """Tokens of the longest sequence, known on the host."""
    kept: torch.Tensor
    """``[K]`` columns of ``input_ids`` whose logits are needed: those before a completion token."""
    targets: torch.Tensor
    """``[rows of input_ids, K]``, the token that follows each kept column."""
    completion_index: torch.Tensor
    """``[B, T]`` where completion token t of sequence b lies among the flattened targets."""
    value_index: torch.Tensor
    """``[B, T]`` where the state before that token lies in the flattened ``input_ids``."""
    last_index: torch.Tensor
    """``[B]`` where the state after the last token lies in the flattened ``input_ids``."""
    mask: torch.Tensor
    """``[B, T]`` bool, true at tokens that enter the losses; observed ones in the middle of a row are none."""
    scored: torch.Tensor
    """``[N]`` where these tokens lie in the flattened ``[B, T]``: what the mask says, without asking the device."""
    num_on_policy: int
    """Of these tokens, those of sequences that the policy that is trained sampled from the first token to the last."""
    num_by_staleness: tuple[tuple[int, int], ...]
    """Versions that these tokens are behind, and how many are."""
    attention: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the model, of which it can tell nothing by itself where it reads a slice of the tokens."""

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of the model's forward pass.

        From position ids alone transformers would look for the sequences in every layer, and wait for the device.
        """
        inputs: dict[str, Any] = {"input_ids": self.input_ids, "use_cache": False}
        if self.position_ids is not None:  # Not every backbone takes them.
            inputs["position_ids"] = self.position_ids
        if self.cu_seq_lens is not None:
            inputs |= packed_lengths(self.cu_seq_lens, self.max_length)
        return inputs | dict(self.attention)


def packed_lengths(starts: torch.Tensor, longest: int) -> dict[str, Any]:
    """What a kernel is told of a packed row's sequences."""
    names = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), starts)
    return names | dict.fromkeys(("max_length_q", "max_length_k"), longest)


def lay_out(batch: SequenceBatch, rows: Sequence[int], *, packed: bool, device: torch.device) -> Microbatch:
    """Build the tensors of one microbatch.

    An empty one becomes a single two-token dummy whose mask is empty: collectives of other ranks need a partner.
    """
    selected = batch.select(rows) if rows else _DUMMY
    prompt, lengths = selected.prompt_lengths.astype(np.int64), selected.lengths.astype(np.int64)
    mask = selected.padded(selected.loss_mask)
    staleness = selected.staleness[selected.loss_mask]
    starts = _starts(lengths, packed=packed)
    ids, positions = _input_ids(selected.token_ids, lengths, packed=packed)
    # Position of the state before completion token t: the last prompt token for t = 0.
    states = (starts + prompt - 1)[:, None] + np.arange(mask.shape[1])[None, :]
    kept, targets, index = _kept_columns(ids, prompt, states, mask, packed=packed)

    def tensor(array: _Integers) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(device)

    return Microbatch(
        rows=tensor(np.asarray(rows)),
        input_ids=tensor(ids),
        position_ids=tensor(positions) if packed else None,
        cu_seq_lens=tensor(np.append(starts, ids.size)).int() if packed else None,
        max_length=int(lengths.max()),
        kept=tensor(kept),
        targets=tensor(targets),
        completion_index=tensor(np.where(mask, index, 0)),
        value_index=tensor(np.where(mask, states, 0)),
        last_index=tensor(starts + lengths - 1),
        mask=torch.from_numpy(mask).to(device),
        scored=tensor(np.flatnonzero(mask)),
        num_on_policy=int(selected.loss_lengths[selected.on_policy].sum()),
        num_by_staleness=tuple((int(each), int((staleness == each).sum())) for each in np.unique(staleness)),
    )


_DUMMY = SequenceBatch.single_turn(
    token_ids=np.zeros(2, dtype=np.int32),
    prompt_lengths=np.ones(1, dtype=np.int32),
    completion_lengths=np.ones(1, dtype=np.int32),
    loss_mask=np.zeros(1, dtype=np.bool_),
)


def _starts(lengths: _Int64Array, *, packed: bool) -> _Int64Array:
    """Where each sequence starts in the flattened ``input_ids``."""
    if packed:
        starts: _Int64Array = np.cumsum(lengths) - lengths
        return starts
    return np.arange(len(lengths)) * int(lengths.max())


def _input_ids(tokens: Int32Array, lengths: _Int64Array, *, packed: bool) -> tuple[_Integers, _Int64Array]:
    positions = np.concatenate([np.arange(length) for length in lengths])
    if packed:
        return tokens[None, :], positions[None, :]
    width = int(lengths.max())
    # The padding's id never matters: no real token attends to it and no mask reads it.
    ids = np.zeros((len(lengths), width), dtype=np.int64)
    ids[np.arange(width)[None, :] < lengths[:, None]] = tokens
    return ids, positions


def _kept_columns(
    ids: _Integers, prompt: _Int64Array, states: _Int64Array, mask: BoolArray, *, packed: bool
) -> tuple[_Int64Array, _Integers, _Int64Array]:
    """Columns whose logits are needed, their targets, and each completion token's place among the targets."""
    if packed:
        kept = states[mask] if mask.any() else states[:, 0]
        index = np.zeros(mask.shape, dtype=np.int64)
        index[mask] = np.arange(int(mask.sum()))
        return kept, ids[:, kept + 1], index
    first, last = int(prompt.min()) - 1, ids.shape[1] - 1
    kept = np.arange(first, last)
    steps = np.arange(mask.shape[1])
    columns = (prompt - 1 - first)[:, None] + steps[None, :]
    rows = np.arange(len(prompt))[:, None] * len(kept)
    return kept, ids[:, first + 1 : last + 1], rows + columns
