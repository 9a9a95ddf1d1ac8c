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
    """``[K]`` ascending columns of ``input_ids`` whose logits are needed: those before a completion token."""
    value_index: torch.Tensor
    """``[B, T]`` where the state before completion token t of sequence b lies in the flattened ``input_ids``."""
    last_index: torch.Tensor
    """``[B]`` where the state after the last token lies in the flattened ``input_ids``."""
    mask: torch.Tensor
    """``[B, T]`` bool, true at tokens that enter the losses; observed ones in the middle of a row are none."""
    scored: torch.Tensor
    """``[N]`` where these tokens lie in the flattened ``[B, T]``: what the mask says, without asking the device."""
    targets: torch.Tensor
    """``[N]``, these tokens."""
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
    starts, width = np.cumsum(lengths) - lengths, int(lengths.max())
    ids: _Integers = selected.token_ids[None, :]
    if not packed:
        starts = np.arange(len(lengths)) * width
        # The padding's id never matters: no real token attends to it and no mask reads it.
        ids = np.zeros((len(lengths), width), dtype=np.int64)
        ids[np.arange(width)[None, :] < lengths[:, None]] = selected.token_ids
    # Position of the state before completion token t: the last prompt token for t = 0.
    states = (starts + prompt - 1)[:, None] + np.arange(mask.shape[1])[None, :]
    scored = states[mask]
    kept = (scored if len(scored) else states[:, 0]) if packed else np.arange(prompt.min() - 1, width - 1)

    def tensor(array: _Integers) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(device)

    return Microbatch(
        rows=tensor(np.asarray(rows)),
        input_ids=tensor(ids),
        position_ids=tensor(np.concatenate([np.arange(each) for each in lengths])[None, :]) if packed else None,
        cu_seq_lens=tensor(np.append(starts, ids.size)).int() if packed else None,
        max_length=width,
        kept=tensor(kept),
        value_index=tensor(np.where(mask, states, 0)),
        last_index=tensor(starts + lengths - 1),
        mask=torch.from_numpy(mask).to(device),
        scored=tensor(np.flatnonzero(mask)),
        targets=tensor(ids.flatten()[scored + 1]),
        num_on_policy=int(selected.loss_lengths[selected.on_policy].sum()),
        num_by_staleness=tuple((int(each), int((staleness == each).sum())) for each in np.unique(staleness)),
    )


_DUMMY = SequenceBatch.single_turn(
    token_ids=np.zeros(2, dtype=np.int32),
    prompt_lengths=np.ones(1, dtype=np.int32),
    completion_lengths=np.ones(1, dtype=np.int32),
    loss_mask=np.zeros(1, dtype=np.bool_),
)
