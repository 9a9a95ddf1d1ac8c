"""What a learner rank knows of its batch before the first optimizer step: numbers per token after the prompt."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.learner.layout import Microbatch

__all__ = ["Estimates", "gather_rows", "scatter_rows"]

_PER_SEQUENCE = ("bootstrap", "trajectory_share", "successful")


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimates:
    """Numbers per token of a rank's batch, ``[N, T]`` each; a stage of the update adds its own by ``replace``."""

    mask: torch.Tensor
    """Bool, true at tokens that enter the losses."""
    rewards: torch.Tensor
    """At the last sampled tokens of turns; the trajectory's last one has the rest of its reward."""
    turn_ids: torch.Tensor
    """Number of the turn in its trajectory, from 0; -1 at observed tokens, 0 in padding."""
    successful: torch.Tensor
    """Bool, ``[N]``, of a trajectory that is imitated."""
    sampling_logprobs: torch.Tensor
    staleness: torch.Tensor
    """Whole versions, 0 where a token is of the policy that is trained."""
    on_policy: torch.Tensor
    """Bool, true at all tokens of a sequence that the policy that is trained sampled from the first to the last."""
    proximal_logprobs: torch.Tensor | None = None
    """Under the policy before the update; ``None`` where no forward pass is made for them before the first step."""
    values: torch.Tensor | None = None
    """The critic's; ``None`` without one."""
    bootstrap: torch.Tensor | None = None
    """``[N]``, value after the last token; 0 where the trajectory finished, or has a further sequence."""
    ref_logprobs: torch.Tensor | None = None
    """``None`` without a reference."""
    advantages: torch.Tensor | None = None
    returns: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    """Bool, false at tokens whose policy loss is left out (M2PO); ``None``: none is."""
    trajectory_share: torch.Tensor | None = None
    """``[N]``, the part of its trajectory's tokens in the losses that a sequence has; ``None``: each has all."""

    @classmethod
    def of(cls, batch: SequenceBatch, device: torch.device) -> Estimates:
        """What the batch itself says."""

        def padded(flat: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(batch.padded(flat)).to(device)

        mask, lengths = padded(batch.loss_mask), batch.loss_lengths
        of_trajectory = np.maximum(batch.per_trajectory(lengths), 1)[batch.of_trajectory]
        several = len(batch.last_sequences) < len(batch)
        return cls(
            mask=mask,
            rewards=padded(batch.token_rewards.astype(np.float32)),
            turn_ids=padded(batch.turn_ids),
            successful=torch.tensor(batch.successful, device=device),
            sampling_logprobs=padded(batch.sampling_logprobs),
            staleness=padded(batch.staleness.astype(np.float32)),
            on_policy=torch.tensor(batch.on_policy, device=device)[:, None].expand(mask.shape),
            trajectory_share=torch.tensor(lengths / of_trajectory, device=device).float() if several else None,
        )

    def rows(self, micro: Microbatch) -> Estimates:
        """Those of a microbatch's tokens, ``[B, T]`` each; zeros for an empty one."""
        known = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in _PER_SEQUENCE}
        gathered = {name: None if table is None else gather_rows(table, micro) for name, table in known.items()}

        def of_rows(numbers: torch.Tensor) -> torch.Tensor:
            return numbers[micro.rows] if len(micro.rows) else numbers.new_zeros(len(micro.mask))

        share = None if self.trajectory_share is None else of_rows(self.trajectory_share)
        return replace(self, bootstrap=None, trajectory_share=share, successful=of_rows(self.successful), **gathered)


def scatter_rows(target: torch.Tensor, micro: Microbatch, rows: torch.Tensor) -> None:
    """Write a microbatch's ``[B, T]`` into its rows of ``[N, T]``."""
    if len(micro.rows):
        target[micro.rows, : rows.shape[1]] = rows * micro.mask


def gather_rows(source: torch.Tensor, micro: Microbatch) -> torch.Tensor:
    """Read a microbatch's ``[B, T]`` from its rows of ``[N, T]``; zeros for an empty one."""
    if len(micro.rows) == 0:
        return source.new_zeros(micro.mask.shape)
    return source[micro.rows, : micro.mask.shape[1]]
