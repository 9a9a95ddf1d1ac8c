"""Keeps numbers that are not finite from the weights of a learner rank, by one decision on all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
import torch.distributed as dist

from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.learner.estimates import Estimates
from rlhf_ray.learner.layout import Microbatch
from rlhf_ray.learner.mesh import gather_objects
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

    Looking waits for nothing: flags stay on the device until :meth:`refusal` reads them, once per step.

    Args:
        batch: The rank's sequences.
        estimates: What is known of them before the first step, advantages included.
        sequences: Which sequences of the whole batch they are.
    """

    def __init__(self, batch: SequenceBatch, estimates: Estimates, sequences: Indices) -> None:
        self._names = list(zip(sequences, batch.group_ids.tolist(), strict=True))
        rewards = torch.from_numpy(np.isfinite(batch.rewards)[batch.of_trajectory] & np.isfinite(batch.greedy_rewards))
        self._known = torch.zeros(len(_STAGES), len(batch), dtype=torch.bool, device=estimates.mask.device)
        self._known[0] = ~rewards.to(self._known.device)
        for stage, tensor in (
            ("sampling log-probabilities", estimates.sampling_logprobs),
            ("reference log-probabilities", estimates.ref_logprobs),
            ("values", estimates.values),
            ("values", estimates.bootstrap),
            ("advantages", estimates.advantages),
            ("advantages", estimates.returns),
        ):
            if tensor is not None:
                self._known[_STAGES.index(stage)] |= ~_finite_rows(tensor, estimates.mask)
        self._nonfinite = self._known
        """``[stages, sequences]`` of the current step."""

    def begin(self, rows: Iterable[int]) -> None:
        """Begin an optimizer step, which reads these of the rank's sequences."""
        read = torch.tensor(list(rows), dtype=torch.int64, device=self._known.device)
        self._nonfinite = torch.zeros_like(self._known).index_copy_(1, read, self._known[:, read])

    def look(self, stage: str, micro: Microbatch, *tensors: torch.Tensor) -> None:
        """Look at a microbatch's ``[B, T]``, or at its loss."""
        if len(micro.rows):  # One that is there for other ranks' collectives has no sequence.
            for tensor in tensors:
                self._nonfinite[_STAGES.index(stage), micro.rows] |= ~_finite_rows(tensor.detach(), micro.mask)

    def refusal(self, grad_norms: Mapping[str, torch.Tensor]) -> str | None:
        """Why the step must not be made, the same on every rank; ``None``: all is finite. A collective.

        Args:
            grad_norms: Of each model's whole gradient, by the model's name.
        """
        is_refused = self._nonfinite.any().int()
        dist.all_reduce(is_refused, dist.ReduceOp.MAX)
        norms = [norm.to(is_refused.device) for norm in grad_norms.values()]
        bad, *nonfinite_norms = torch.stack([is_refused.bool(), *(~torch.isfinite(norm) for norm in norms)]).tolist()
        if not bad and not any(nonfinite_norms):
            return None
        own = min(((stage, *self._names[row]) for stage, row in self._nonfinite.nonzero().tolist()), default=None)
        first = min((one for one in gather_objects(own) if one is not None), default=None)
        if first is None:
            model = next(name for name, is_nonfinite in zip(grad_norms, nonfinite_norms, strict=True) if is_nonfinite)
            return f"gradient of the {model} not finite, although all that it was computed from is"
        stage, sequence, group = first
        return f"{_STAGES[stage]} not finite, first in sequence {sequence} of the batch, of group {group}"


def _finite_rows(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``[N]`` whether a sequence's numbers are finite where the mask is true; of a loss, ``[1]``."""
    finite = torch.isfinite(tensor)
    return (finite | ~mask).all(dim=-1) if tensor.ndim == 2 else finite.view(-1)
