"""Whether models keep sequences apart that are packed into one row, tried out before the first update.

Attention does so by cumulative lengths. Layers with a state of their own (convolutions, recurrences), and models that
do not pass the lengths on, let a sequence see those before it. Nothing in a configuration says so.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.learner.layout import Microbatch, lay_out
from rlhf_ray.learner.logprob_head import TokenScorer
from rlhf_ray.learner.mesh import gather_objects
from rlhf_ray.learner.models import hidden_states, reshard
from rlhf_ray.learner.varlen_attention import VARLEN

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["can_pack", "keeps_sequences_apart", "skips_other_sequences", "takes_lengths"]

_LOG = logging.getLogger(__name__)
_LENGTH = 16
# Routers of experts and tiles of half-precision products see other neighbors; a leak changes far more.
_TOLERANCE = {torch.float32: 1e-4}
_TOLERANCE_IN_HALF_PRECISION = 3e-2


def can_pack(
    score: TokenScorer, critic: PreTrainedModel | None, device: torch.device, compute_dtype: torch.dtype
) -> bool:
    """Whether the rows of policy and (sharded) critic may be packed, on all ranks or none; a collective."""
    answers: dict[PreTrainedModel, Callable[[Microbatch], Sequence[Tensor]]] = {score.model: score}
    if critic is not None:  # Not its values: a new head answers 0 to all.
        answers[critic] = lambda micro: [hidden_states(critic, micro.model_inputs()).flatten(0, -2)[micro.value_index]]
    kernels = [model.config._attn_implementation for model in answers]
    packed = all(map(skips_other_sequences, kernels)) and all(map(takes_lengths, answers))
    if packed:  # Of all models, whatever the first answers: it takes collectives.
        apart = [
            keeps_sequences_apart(
                answer,
                vocabulary_size=model.get_input_embeddings().num_embeddings,
                device=device,
                compute_dtype=compute_dtype,
            )
            for model, answer in answers.items()
        ]
        packed = all(apart)
    for model in answers:
        reshard(model)
    packed = all(gather_objects(packed))
    if dist.get_rank() == 0:
        level = logging.WARNING if device.type == "cuda" and not packed else logging.INFO
        _LOG.log(level, "learners read %s rows, attention by %s", "packed" if packed else "padded", kernels[0])
    return packed


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
    answer: Callable[[Microbatch], Sequence[Tensor]],
    *,
    vocabulary_size: int,
    device: torch.device,
    compute_dtype: torch.dtype,
) -> bool:
    """Whether what a model answers for a sequence is the same whatever is packed before it; a collective with FSDP.

    Args:
        answer: The model's, of which the first is ``[B, T]`` or ``[B, T, ...]``.
        vocabulary_size: Token ids are below it.
        device: Where the model is.
        compute_dtype: What it computes in.
    """
    first, second, same = np.random.default_rng(0).integers(vocabulary_size, size=(3, _LENGTH), dtype=np.int32)
    lengths = np.ones(2, dtype=np.int32), np.full(2, _LENGTH - 1, dtype=np.int32)
    answers = []
    for before in (first, second):
        batch = SequenceBatch.single_turn(
            token_ids=np.concatenate([before, same]), prompt_lengths=lengths[0], completion_lengths=lengths[1]
        )
        answers.append(answer(lay_out(batch, range(2), packed=True, device=device))[0][-1])
    tolerance = _TOLERANCE.get(compute_dtype, _TOLERANCE_IN_HALF_PRECISION)
    return bool((answers[0] - answers[1]).abs().max() <= tolerance * answers[0].abs().max().clamp(min=1.0))
