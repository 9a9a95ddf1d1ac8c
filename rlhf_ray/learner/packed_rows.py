"""Before the first update: whether a model keeps sequences apart that are packed into one row.

Attention does so by cumulative lengths. Layers with a state of their own (convolutions, recurrences), and models that
do not hand the lengths on, let a sequence see those before it. Nothing in a configuration says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.learner.layout import Microbatch, lay_out
from rlhf_ray.learner.varlen_attention import VARLEN

__all__ = ["keeps_sequences_apart", "skips_other_sequences", "takes_lengths"]

_LENGTH = 16
# Routers of experts and tiles of half-precision products see other neighbors; a leak changes far more.
_TOLERANCE = {torch.float32: 1e-4}
_TOLERANCE_IN_HALF_PRECISION = 3e-2


def skips_other_sequences(kernel: str) -> bool:
    """Whether attention over a packed row costs no more than over its sequences; others compute the whole square."""
    return kernel in (VARLEN, "flex_attention") or "flash" in kernel


def takes_lengths(model: nn.Module) -> bool:
    """Whether a model's forward pass accepts what :meth:`Microbatch.model_inputs` passes it of a packed row."""
    return any(
        one.kind is inspect.Parameter.VAR_KEYWORD for one in inspect.signature(model.forward).parameters.values()
    )


@torch.no_grad()  # type: ignore[untyped-decorator]
def keeps_sequences_apart(
    score: Callable[[Microbatch], Sequence[torch.Tensor]],
    *,
    vocabulary_size: int,
    device: torch.device,
    compute_dtype: torch.dtype,
) -> bool:
    """Whether what a model answers for a sequence is the same whatever is packed before it; a collective with FSDP.

    Args:
        score: The model: its first answer is ``[B, T]`` or ``[B, T, ...]``.
        vocabulary_size: Token ids are below it.
        device: Where the model is.
        compute_dtype: What it computes in.
    """
    first, second, same = np.random.default_rng(0).integers(vocabulary_size, size=(3, _LENGTH), dtype=np.int32)
    scored = [_last_of_row(score, np.stack([before, same]), device) for before in (first, second)]
    tolerance = _TOLERANCE.get(compute_dtype, _TOLERANCE_IN_HALF_PRECISION)
    return bool((scored[0] - scored[1]).abs().max() <= tolerance * scored[0].abs().max().clamp(min=1.0))


def _last_of_row(
    score: Callable[[Microbatch], Sequence[torch.Tensor]], sequences: np.ndarray, device: torch.device
) -> torch.Tensor:
    """The answers for the last of some sequences in one packed row, of all its tokens but the first."""
    count, length = sequences.shape
    ones = np.ones(count, dtype=np.int32)
    completion_tokens = count * (length - 1)
    batch = SequenceBatch(
        token_ids=sequences.reshape(-1),
        prompt_lengths=ones,
        completion_lengths=ones * (length - 1),
        sampling_logprobs=np.zeros(completion_tokens, dtype=np.float32),
        staleness=np.zeros(completion_tokens, dtype=np.int32),
        fresh=np.ones(count, dtype=np.bool_),
        rewards=np.zeros(count, dtype=np.float32),
        truncated=np.zeros(count, dtype=np.bool_),
        group_ids=np.arange(count),
        greedy_rewards=np.zeros(count, dtype=np.float32),
        loss_starts=ones * 0,
    )
    return score(lay_out(batch, range(count), packed=True, device=device))[0][-1]
