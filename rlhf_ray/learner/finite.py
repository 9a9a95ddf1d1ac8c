"""On a learner rank: keeps numbers that are not finite from the weights, by one decision on all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.learner.estimates import Estimates
from rlhf_ray.learner.layout import Microbatch
from rlhf_ray.learner.packing import Indices

__all__ = ["MOST_SKIPPED", "FiniteGuard"]

MOST_SKIPPED = 20
"""Optimizer steps in a row that ``training.nonfinite_updates = skip`` leaves out before the run ends."""

# In the order in which they follow from each other: the first that is not finite is the cause of the others.
_STAGES = (
    "rewards",
    "sampling log-probabilities",
    "reference log-probabilities",
    "values",
    "advantages",
    "log-probabilities",
    "value loss",
    "policy loss",
)


class FiniteGuard:
    """Looks at what the optimizer steps of one update read and compute.

    Looking waits for nothing: flags stay on the device until :meth:`refusal` reads them, once a step.

    Args:
        batch: The rank's sequences.
        estimates: What is known of them before the first step, advantages included.
        sequences: Which sequences of the whole batch they are.
    """

    def __init__(self, batch: SequenceBatch, estimates: Estimates, sequences: Indices) -> None:
        self._sequences = sequences
        self._group_ids = batch.group_ids
        rewards = torch.from_numpy(np.isfinite(batch.rewards) & np.isfinite(batch.greedy_rewards))
        given = {
            "sampling log-probabilities": (estimates.sampling_logprobs,),
            "reference log-probabilities": (estimates.ref_logprobs,),
            "values": (estimates.values, estimates.bootstrap),
            "advantages": (estimates.advantages, estimates.returns),
        }
        self._given = {"rewards": rewards.to(estimates.mask.device)} | {
            stage: torch.stack(flags).all(dim=0)
            for stage, tensors in given.items()
            if (flags := [_finite_rows(one, estimates.mask) for one in tensors if one is not None])
        }
        self._seen: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        self.begin(range(len(batch)))

    def begin(self, rows: Iterable[int]) -> None:
        """Begin an optimizer step, which reads these of the rank's sequences."""
        read = torch.tensor(list(rows), dtype=torch.int64, device=self._given["rewards"].device)
        self._seen = [(stage, read, finite[read]) for stage, finite in self._given.items()]

    def look(self, stage: str, micro: Microbatch, *tensors: torch.Tensor) -> None:
        """Look at a microbatch's ``[B, T]``, or at its loss."""
        if len(micro.rows):  # One that is there for other ranks' collectives has no sequence.
            for tensor in tensors:
                self._seen.append((stage, micro.rows, _finite_rows(tensor.detach(), micro.mask)))

    def refusal(self, grad_norms: Mapping[str, torch.Tensor]) -> str | None:
        """Why the step must not be made, the same on every rank; ``None``: all is finite. A collective.

        Args:
            grad_norms: Of each model's whole gradient, by the model's name.
        """
        is_refused = (~torch.stack([flags.all() for _, _, flags in self._seen]).all()).int()
        dist.all_reduce(is_refused, dist.ReduceOp.MAX)
        norms = [norm.to(is_refused.device) for norm in grad_norms.values()]
        bad, *endless = torch.stack([is_refused.bool(), *(~torch.isfinite(norm) for norm in norms)]).tolist()
        if not bad and not any(endless):
            return None
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, self._first())
        first = min((one for one in found if one is not None), default=None)
        if first is None:
            model = next(name for name, is_endless in zip(grad_norms, endless, strict=True) if is_endless)
            return f"gradient of the {model} not finite, although all that it was computed from is"
        stage, sequence, group = first
        return f"{_STAGES[stage]} not finite, first in sequence {sequence} of the batch, of group {group}"

    def _first(self) -> tuple[int, int, int] | None:
        """The earliest stage that went wrong on this rank, the first sequence of it in the batch, and its group."""
        return min(
            (
                (_STAGES.index(stage), self._sequences[row], int(self._group_ids[row]))
                for stage, rows, finite in self._seen
                for row in rows[~finite.expand(rows.shape)].tolist()
            ),
            default=None,
        )


def _finite_rows(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``[N]`` whether a sequence's numbers are finite where the mask is true; of a loss, ``[1]``."""
    finite = torch.isfinite(tensor)
    return (finite | ~mask).all(dim=-1) if tensor.ndim == 2 else finite.view(-1)
