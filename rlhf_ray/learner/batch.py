"""The sequences of one update, flat and variable-length: what travels from the Algorithm to a learner rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from rlhf_ray.types import Float32Array, Int32Array, ScoredGroup, Trajectory

__all__ = ["SequenceBatch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceBatch:
    """N sequences (prompt and completion) laid end to end."""

    token_ids: Int32Array
    """``[sum(P + T)]``"""
    prompt_lengths: Int32Array
    """``[N]``, P"""
    completion_lengths: Int32Array
    """``[N]``, T"""
    sampling_logprobs: Float32Array
    """``[sum(T)]``"""
    staleness: Int32Array
    """``[sum(T)]``, policy version that is trained minus the version that sampled the token"""
    fresh: npt.NDArray[np.bool_]
    """``[N]``, written from the first token to the last by the policy that is trained"""
    rewards: Float32Array
    """``[N]``"""
    truncated: npt.NDArray[np.bool_]
    """``[N]``, cut by a length limit: bootstraps from the critic"""
    group_ids: npt.NDArray[np.int64]
    """``[N]``, completions of one prompt have the same"""
    greedy_rewards: Float32Array
    """``[N]``, reward of the greedy completion of the prompt; 0 where none was sampled"""
    loss_starts: Int32Array
    """``[N]``, first completion token that enters the losses; T where none does"""

    @classmethod
    def from_groups(cls, groups: Sequence[ScoredGroup], *, version: int, max_staleness: int) -> SequenceBatch:
        """Lay out the completions of all groups, in order; ``version`` is the policy's that is to be trained.

        Tokens that are staler than ``max_staleness``, of completions that were carried over, do not enter the losses;
        they come first, for versions only rise.
        """
        sizes = [len(scored.group.trajectories) for scored in groups]
        rows = [(scored.group.prompt, c) for scored in groups for c in scored.group.trajectories]
        staleness = [np.int32(version) - _versions(c) for _, c in rows]
        return cls(
            token_ids=np.concatenate([piece for prompt, c in rows for piece in (prompt.token_ids, c.token_ids)]),
            prompt_lengths=np.asarray([len(prompt.token_ids) for prompt, _ in rows], dtype=np.int32),
            completion_lengths=np.asarray([len(c.token_ids) for _, c in rows], dtype=np.int32),
            sampling_logprobs=np.concatenate([c.sampling_logprobs for _, c in rows]),
            staleness=np.concatenate(staleness),
            fresh=np.asarray(
                [c.asked_version == version and not s.any() for (_, c), s in zip(rows, staleness, strict=True)]
            ),
            rewards=np.concatenate([scored.rewards for scored in groups]),
            truncated=np.asarray([c.truncated for _, c in rows], dtype=np.bool_),
            group_ids=np.repeat([scored.group.group_id for scored in groups], sizes).astype(np.int64),
            greedy_rewards=np.repeat([scored.greedy_reward or 0.0 for scored in groups], sizes).astype(np.float32),
            loss_starts=np.asarray([np.count_nonzero(s > max_staleness) for s in staleness], dtype=np.int32),
        )

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def lengths(self) -> Int32Array:
        """``[N]``, P + T."""
        return self.prompt_lengths + self.completion_lengths

    @property
    def loss_lengths(self) -> Int32Array:
        """``[N]``, completion tokens that enter the losses."""
        return self.completion_lengths - self.loss_starts

    @property
    def in_loss(self) -> npt.NDArray[np.bool_]:
        """``[sum(T)]``, whether a completion token enters the losses."""
        lengths = self.completion_lengths
        firsts = np.cumsum(lengths) - lengths + self.loss_starts
        entering: npt.NDArray[np.bool_] = np.arange(int(lengths.sum())) >= np.repeat(firsts, lengths)
        return entering

    def loss_mask(self) -> npt.NDArray[np.bool_]:
        """``[N, max(T)]``, true at completion tokens that enter the losses."""
        steps = np.arange(int(self.completion_lengths.max(initial=0)))
        mask: npt.NDArray[np.bool_] = (steps >= self.loss_starts[:, None]) & (steps < self.completion_lengths[:, None])
        return mask

    def select(self, indices: Sequence[int]) -> SequenceBatch:
        """The given sequences, in that order."""
        order = np.asarray(indices, dtype=np.int64)
        return SequenceBatch(
            token_ids=_select_ragged(self.token_ids, self.lengths, order),
            prompt_lengths=self.prompt_lengths[order],
            completion_lengths=self.completion_lengths[order],
            sampling_logprobs=_select_ragged(self.sampling_logprobs, self.completion_lengths, order),
            staleness=_select_ragged(self.staleness, self.completion_lengths, order),
            fresh=self.fresh[order],
            rewards=self.rewards[order],
            truncated=self.truncated[order],
            group_ids=self.group_ids[order],
            greedy_rewards=self.greedy_rewards[order],
            loss_starts=self.loss_starts[order],
        )

    def size_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(getattr(self, field.name).nbytes for field in fields(self))


def _versions(completion: Trajectory) -> Int32Array:
    """``[T]``, which policy version sampled each token."""
    spans = completion.version_spans
    lengths = [span.end - span.start for span in spans]
    return np.repeat(np.asarray([span.version for span in spans], dtype=np.int32), lengths)


def _select_ragged(values: npt.NDArray[np.generic], lengths: Int32Array, order: npt.NDArray[np.int64]) -> npt.NDArray:  # type: ignore[type-arg]
    ends = np.cumsum(lengths)
    pieces = [values[ends[i] - lengths[i] : ends[i]] for i in order]
    return np.concatenate(pieces) if pieces else values[:0]
