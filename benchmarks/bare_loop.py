"""What the learner's work costs without the library: plain PyTorch on the learner's own microbatches."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.learner.layout import Microbatch, lay_out
from rlhf_ray.learner.models import load_critic, load_policy
from rlhf_ray.learner.packing import RankPlan, plan_update
from rlhf_ray.types import Int32Array

CPU = torch.device("cpu")


def sequences_of(prompt_tokens: int, completion_lengths: Int32Array, **changes: Any) -> SequenceBatch:
    """A batch of these lengths; what it says does not change what it costs."""
    count, tokens = len(completion_lengths), int(completion_lengths.sum())
    arrays: dict[str, Any] = {
        "token_ids": np.ones(tokens + count * prompt_tokens, dtype=np.int32),
        "prompt_lengths": np.full(count, prompt_tokens, dtype=np.int32),
        "completion_lengths": completion_lengths,
    }
    return SequenceBatch.single_turn(**arrays | changes)


def split(
    batch: SequenceBatch, *, num_minibatches: int, max_tokens: int, num_epochs: int = 1
) -> tuple[SequenceBatch, RankPlan, list[list[Microbatch]]]:
    """The split that a run on one learner would make: its sequences in their order, the plan, and the microbatches."""
    plan = plan_update(
        batch.lengths.tolist(),
        batch.loss_lengths.tolist(),
        num_minibatches=num_minibatches,
        num_epochs=num_epochs,
        num_ranks=1,
        max_tokens=max_tokens,
        attention_length=1536.0,
        packed=False,
        seed=0,
    )
    own, (rank,) = batch.select(plan.sequences[0]), plan.ranks
    microbatches = [
        [lay_out(own, rows, packed=False, device=CPU) for rows in minibatch.microbatches]
        for minibatch in rank.minibatches
    ]
    return own, rank, microbatches


class BareLoop:
    """Plain models and optimizers: a forward pass for the old policy (several steps), forward, backward, step."""

    def __init__(self, path: str, *, critic: bool) -> None:
        loading: dict[str, Any] = {"kernels": ("sdpa",), "trust_remote_code": False}
        self._models = [load_policy(path, **loading)]
        if critic:
            self._models.append(load_critic(path, **loading))
        self._optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-9, fused=True) for m in self._models]

    def planned(self, minibatches: list[list[Microbatch]], *, epochs: int = 1) -> None:
        """The learner's passes on the learner's microbatches."""
        with torch.no_grad():
            for index, minibatch in enumerate(minibatches):
                for micro in minibatch:
                    if len(self._models) > 1:
                        self._values(micro)
                    if index > 0:  # The first step's own pass is the old policy's.
                        self._logprobs(micro.input_ids, micro.input_ids[:, micro.kept + 1], micro.kept)
        for minibatch in minibatches * epochs:
            for micro in minibatch:
                if len(self._models) > 1:
                    (self._values(micro).square() * 1e-3).mean().backward()
                rows, columns = (
                    micro.value_index // micro.input_ids.shape[1],
                    micro.value_index % micro.input_ids.shape[1],
                )
                logprobs = self._logprobs(micro.input_ids, micro.input_ids[:, micro.kept + 1], micro.kept)
                chosen = logprobs[rows, (columns - micro.kept[0]).clamp(min=0)]
                (chosen * micro.mask).sum().div(1e5).backward()
            self._step()

    def in_input_order(self, batch: SequenceBatch, size: int) -> None:
        """One optimizer step over batches of ``size``, all padded to the longest sequence, with whole logits."""
        width = int(batch.lengths.max())
        ends = np.cumsum(batch.lengths)
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        for row, (end, length) in enumerate(zip(ends, batch.lengths, strict=True)):
            ids[row, :length] = torch.from_numpy(batch.token_ids[end - length : end].astype(np.int64))
        mask = torch.arange(width)[None, :] < torch.from_numpy(batch.lengths)[:, None]
        for part in range(0, len(batch), size):
            rows = ids[part : part + size]
            chosen = self._logprobs(rows, rows[:, 1:], None)
            (chosen * mask[part : part + size, 1:]).sum().div(1e5).backward()
        self._step()

    def _values(self, micro: Microbatch) -> torch.Tensor:
        values: torch.Tensor = self._models[1](input_ids=micro.input_ids, use_cache=False).logits
        return values

    def _logprobs(self, ids: torch.Tensor, targets: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        if kept is None:
            logits = self._models[0](input_ids=ids, use_cache=False).logits[:, :-1]
        else:
            logits = self._models[0](input_ids=ids, logits_to_keep=kept, use_cache=False).logits
        return logits.gather(-1, targets[..., None]).squeeze(-1) - logits.logsumexp(-1)

    def _step(self) -> None:
        for model, optimizer in zip(self._models, self._optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
