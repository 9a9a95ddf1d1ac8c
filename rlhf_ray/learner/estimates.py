"""Before stage 4 on a learner rank: what it knows of its batch before the first step, a number a completion token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.learner.layout import Microbatch, pad_completions

__all__ = ["Estimates", "put", "take"]


@dataclass(slots=True, kw_only=True)
class Estimates:
    """Per-token figures of a rank's batch, ``[N, T]`` each."""

    mask: torch.Tensor
    """Bool, true at tokens that enter the losses."""
    sampling_logprobs: torch.Tensor
    staleness: torch.Tensor
    """Whole versions, 0 where a token is of the policy that is trained."""
    fresh: torch.Tensor
    """Bool, true at all tokens of a completion that was written by the policy that is trained."""
    proximal_logprobs: torch.Tensor
    """Under the policy before the update; those of the first step's minibatch are written by that step."""
    values: torch.Tensor | None = None
    """The critic's; ``None`` without one."""
    bootstrap: torch.Tensor | None = None
    """``[N]``, value after the last token; 0 where the completion finished."""
    ref_logprobs: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    """Bool, false at tokens whose policy loss is left out (M2PO); ``None``: none is."""
    advantages: torch.Tensor | None = None
    returns: torch.Tensor | None = None

    @classmethod
    def of(cls, batch: SequenceBatch, *, device: torch.device, values: bool, reference: bool) -> Estimates:
        """Make room for the figures that a run has."""
        sampling = pad_completions(batch.sampling_logprobs, batch.completion_lengths, device=device)
        return cls(
            mask=torch.from_numpy(batch.loss_mask()).to(device),
            sampling_logprobs=sampling,
            staleness=pad_completions(batch.staleness.astype(np.float32), batch.completion_lengths, device=device),
            fresh=torch.tensor(batch.fresh, device=device)[:, None].expand(sampling.shape),
            proximal_logprobs=torch.zeros_like(sampling),
            values=torch.zeros_like(sampling) if values else None,
            bootstrap=torch.zeros(len(batch), device=device) if values else None,
            ref_logprobs=torch.zeros_like(sampling) if reference else None,
        )


def put(target: torch.Tensor, micro: Microbatch, rows: torch.Tensor) -> None:
    """Write a microbatch's ``[B, T]`` into its rows of ``[N, T]``."""
    if len(micro.rows):
        target[micro.rows, : rows.shape[1]] = rows * micro.mask


def take(source: torch.Tensor, micro: Microbatch) -> torch.Tensor:
    """Read a microbatch's ``[B, T]`` from its rows of ``[N, T]``; zeros for an empty one."""
    width = micro.mask.shape[1]
    if len(micro.rows) == 0:
        return source.new_zeros(micro.mask.shape)
    return source[micro.rows, :width]
