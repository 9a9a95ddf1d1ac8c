"""Sequence parallelism on a learner rank: the ranks of a sequence group read each microbatch in slices.

"DeepSpeed Ulysses" (arXiv:2309.14509). Every layer sees this rank's slice of the tokens, except for attention: there
each rank has all tokens of its share of the heads, so that any kernel serves unchanged::

    [B, H, L / n, D]  -- all-to-all -->  [B, H / n, L, D]  -- kernel, all-to-all -->  [B, L / n, H, D]

Each rank scores the tokens of its slice, and the group merges what it scored: losses and metrics are computed alike on
all of its ranks. The backward pass of a rank begins at its own tokens alone, so that gradients summed over all ranks
are those of whole sequences.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_to_all_single

from rlhf_ray.errors import ConfigError
from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.learner.layout import Microbatch, lay_out, packed_lengths
from rlhf_ray.learner.mesh import gather_objects
from rlhf_ray.learner.models import hidden_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["SequenceSlices"]

_PROBE_TOKENS_PER_RANK = 8
# Of the norm of a slice's hidden states. Attention that misses the other slices changes them by tenths.
_TOLERANCE = {torch.float32: 1e-4}
_TOLERANCE_IN_HALF_PRECISION = 3e-2


class SequenceSlices:
    """This rank's slices of what its group reads.

    Args:
        group: Ranks of the group, in the order of their slices.
        device: Where this rank computes.
        compute_dtype: And in what.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, compute_dtype: torch.dtype) -> None:
        self._group = group
        self._size, self._rank = dist.get_world_size(group), dist.get_rank(group)
        self._device, self._dtype = device, compute_dtype

    def adopt(self, model: PreTrainedModel) -> None:
        """Have a model's attention, whatever its kernel, exchange tokens for heads: from now on it reads slices."""
        from transformers import AttentionInterface, PretrainedConfig

        kernel = model.config._attn_implementation
        # Registered as no mask: models then make none, since they know of no token but their own.
        AttentionInterface.register(self._prefix + kernel, torch.compiler.disable(self._attention(kernel)))
        for module in model.modules():
            config = getattr(module, "config", None)
            if isinstance(config, PretrainedConfig) and config._attn_implementation == kernel:
                config._attn_implementation = self._prefix + kernel

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def adopt_tested(self, model: PreTrainedModel, field: str, *, packed: bool) -> None:
        """As :meth:`adopt`, of a (sharded) model that computes the same in slices of random tokens; a collective.

        Args:
            model: The model.
            field: The setting that names it, for messages.
            packed: Whether it reads packed rows.

        Raises:
            ConfigError: It does not compute the same on some rank; on every rank.
        """
        length = self._size * _PROBE_TOKENS_PER_RANK - 1
        # Packed, two sequences, of which the second lies in two slices.
        lengths = np.asarray([length // 3, length - length // 3] if packed else [length], dtype=np.int32)
        vocabulary_size = model.get_input_embeddings().num_embeddings
        batch = SequenceBatch.single_turn(
            token_ids=np.random.default_rng(0).integers(vocabulary_size, size=length, dtype=np.int32),
            prompt_lengths=np.ones_like(lengths),
            completion_lengths=lengths - 1,
        )
        micro = lay_out(batch, range(len(lengths)), packed=packed, device=self._device)
        mine = hidden_states(model, micro.model_inputs())[:, self._own(length)]
        self.adopt(model)
        problem = ""
        try:
            sliced = hidden_states(model, self.shard(micro, model).model_inputs())[:, : mine.shape[1]]
            deviation = float((sliced - mine).norm() / mine.norm())
        except Exception as error:  # Whatever a model's code makes of a slice; it is reported below.
            deviation, problem = math.inf, repr(error)
        if not deviation <= _TOLERANCE.get(self._dtype, _TOLERANCE_IN_HALF_PRECISION):
            problem = problem or f"its hidden states differ by {deviation:.1g} of their norm"
        for reason in filter(None, gather_objects(problem)):
            name = type(model).__name__.removeprefix("FSDP")
            remedy = f"{field}: {name} cannot read a sequence in slices ({reason}); use 1"
            raise ConfigError("learners.sequence_parallel", self._size, remedy)

    def shard(self, micro: Microbatch, model: PreTrainedModel) -> Microbatch:
        """This rank's slice of a microbatch, for a model that was adopted.

        The mask of the slice is true at the completion tokens that are scored here, of which there may be none;
        ``last_index`` remains that of the whole rows.
        """
        length, own = micro.input_ids.shape[1], self._own(micro.input_ids.shape[1])
        is_own = (micro.kept >= own.start) & (micro.kept < own.stop)
        if not is_own.any():  # Models answer for one column at least.
            is_own[0] = True
        kept = (micro.kept[is_own] - own.start).clamp(0, own.stop - own.start - 1)
        rows, columns = micro.value_index // length, micro.value_index % length
        mask = micro.mask & (columns >= own.start) & (columns < own.stop)
        is_scored = mask.flatten()[micro.scored]
        ids, positions, attention = self._inputs(micro, model.config._attn_implementation.removeprefix(self._prefix))
        return replace(
            micro,
            input_ids=ids[:, own].contiguous(),
            position_ids=positions[:, own].contiguous(),
            cu_seq_lens=None,
            kept=kept,
            value_index=torch.where(mask, rows * (own.stop - own.start) + columns - own.start, 0),
            mask=mask,
            scored=micro.scored[is_scored],
            targets=micro.targets[is_scored],
            attention=attention,
        )

    def gather_tokens(self, scored: Tensor) -> Tensor:
        """Numbers that are 0 but for the tokens of this rank's slice, with those of all slices; gradients stay here."""
        merged: Tensor = _Merge.apply(scored, self._group)
        return merged

    def gather_columns(self, sliced: Tensor, micro: Microbatch) -> Tensor:
        """``[rows, width]`` numbers of the tokens of this rank's slice, to ``[rows, L]`` of the whole microbatch."""
        width = sliced.shape[1]
        padding = (self._rank * width, (self._size - 1 - self._rank) * width)
        return self.gather_tokens(nn.functional.pad(sliced, padding))[:, : micro.input_ids.shape[1]]

    @property
    def _prefix(self) -> str:
        return f"sequence_parallel_{self._size}_"

    def _own(self, length: int) -> slice:
        """Columns of this rank's slice of a row."""
        width = -(-length // self._size)
        return slice(self._rank * width, (self._rank + 1) * width)

    def _inputs(self, micro: Microbatch, kernel: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """``[rows, L]`` tokens and positions, padded so that all slices are equal, and what attention reads of them."""
        ids, positions, starts, longest = micro.input_ids, micro.position_ids, micro.cu_seq_lens, micro.max_length
        length = ids.shape[1]
        padding = -length % self._size
        if positions is None:
            positions = torch.arange(length, device=ids.device).expand_as(ids)
        if starts is not None and padding:  # The padding is a sequence of its own.
            starts, longest = torch.cat([starts, starts[-1:] + padding]), max(longest, padding)
        tail = torch.arange(padding, device=ids.device) + (0 if starts is not None else length)
        positions = torch.cat([positions, tail.expand(len(ids), padding)], dim=1)
        return nn.functional.pad(ids, (0, padding)), positions, self._whole(kernel, positions, starts, longest)

    def _whole(self, kernel: str, positions: Tensor, starts: Tensor | None, longest: int) -> dict[str, Any]:
        """The mask that a kernel reads, of ``[rows, L]`` tokens; for one that reads none, where sequences begin."""
        from transformers.masking_utils import (
            ALL_MASK_ATTENTION_FUNCTIONS,
            and_masks,
            causal_mask_function,
            packed_sequence_mask_function,
        )

        rows, length = positions.shape
        function = causal_mask_function
        if starts is not None:
            function = and_masks(function, packed_sequence_mask_function((positions == 0).cumsum(dim=1)))
        make_mask = ALL_MASK_ATTENTION_FUNCTIONS.get(kernel)
        mask = make_mask and make_mask(
            batch_size=rows,
            q_length=length,
            kv_length=length,
            q_offset=0,
            kv_offset=0,
            mask_function=function,
            attention_mask=None,
            allow_is_causal_skip=starts is None,
            dtype=self._dtype,
            device=positions.device,
        )
        return packed_lengths(starts, longest) if mask is None and starts is not None else {"attention_mask": mask}

    def _attention(self, kernel: str) -> Callable[..., tuple[Tensor, None]]:
        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
        ) -> tuple[Tensor, None]:
            repeats = self._size // math.gcd(self._size, key.shape[1])
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
            kwargs.pop("position_ids", None)  # Those of the slice.
            seen = _with_shared_heads(module, kernel, query.shape[1] // key.shape[1])
            heads = [self._exchange(one) for one in (query, key, value)]
            output, _ = _kernel(kernel, module)(seen, *heads, attention_mask, **kwargs)
            return self._exchange(output), None

        return attend

    def _exchange(self, x: Tensor) -> Tensor:
        """``[B, H, L / n, D]`` to ``[B, H / n, L, D]``, or ``[B, L, H / n, D]`` to ``[B, L / n, H, D]``."""
        parts = x.unflatten(1, (self._size, -1)).movedim(1, 0).contiguous()
        received: Tensor = all_to_all_single(torch.empty_like(parts), parts, group=self._group)
        return received.movedim(0, 2).flatten(2, 3)


class _Merge(torch.autograd.Function):  # type: ignore[misc]
    """The sum over the ranks of a group, of which one has a number and the others 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        merged = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(merged, group=group)
        return merged

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Every rank has the same loss: each takes what concerns its slice, and no sum.
        return gradient, None


def _with_shared_heads(module: nn.Module, kernel: str, num_key_value_groups: int) -> nn.Module:
    """An attention module as its kernel sees it: with this rank's share of the heads, and its own kernel's name."""
    seen, config = copy.copy(module), copy.copy(module.config)
    config._attn_implementation_internal = kernel
    seen.config, seen.num_key_value_groups = config, num_key_value_groups
    return seen


def _kernel(name: str, module: nn.Module) -> Callable[..., Any]:
    """The attention function of a name; the eager one is that of the module's family."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    families = (sys.modules[base.__module__] for base in type(module).__mro__)
    eager = next((own for one in families if (own := getattr(one, "eager_attention_forward", None))), None)
    kernel: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    return kernel
