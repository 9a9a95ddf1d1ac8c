"""The sequences of one update, flat and variable-length: what travels from the Algorithm to a learner rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from rlhf_ray.types import BoolArray, Float32Array, Int32Array, ScoredGroup

__all__ = ["SequenceBatch"]

Int64Array = npt.NDArray[np.int64]


_PER_COMPLETION_TOKEN = ("sampled", "loss_mask", "sampling_logprobs", "staleness", "token_rewards")


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceBatch:
    """N sequences (a prompt and the tokens after it) laid end to end.

    Example:
        After the prompt ``7 7`` the policy samples ``1 2``, observes ``9``, and samples ``3`` for a reward of 1::

            token_ids      7 7 1 2 9 3
            sampled            1 1 0 1
            token_rewards      0 0 0 1
    """

    token_ids: Int32Array
    """``[sum(P + T)]``"""
    prompt_lengths: Int32Array
    """``[N]``, P"""
    completion_lengths: Int32Array
    """``[N]``, T: all tokens after the prompt, observed ones too"""
    sampled: BoolArray
    """``[sum(T)]``, sampled by the policy, not observed"""
    loss_mask: BoolArray
    """``[sum(T)]``, sampled, and enters the losses"""
    sampling_logprobs: Float32Array
    """``[sum(T)]``, 0 at observed tokens"""
    staleness: Int32Array
    """``[sum(T)]``, policy version that is trained minus the version that sampled the token; 0 at observed tokens"""
    token_rewards: Float32Array
    """``[sum(T)]``, rewards at the last sampled tokens of turns; the last one has that of the whole trajectory too"""
    on_policy: BoolArray
    """``[N]``, sampled from the first token to the last by the policy that is trained"""
    truncated: BoolArray
    """``[N]``, cut by a length limit: bootstraps from the critic"""
    group_ids: Int64Array
    """``[N]``, trajectories of one prompt have the same"""
    greedy_rewards: Float32Array
    """``[N]``, reward of the greedy completion of the prompt; 0 where none was sampled"""

    @classmethod
    def from_groups(cls, groups: Sequence[ScoredGroup], *, version: int, max_staleness: int) -> SequenceBatch:
        """Lay out the trajectories of all groups, in order; ``version`` is the policy's that is to be trained.

        Tokens that are staler than ``max_staleness``, of trajectories that were carried over, do not enter the losses.
        """
        rows = [
            _row(scored, index, version, max_staleness)
            for scored in groups
            for index in range(len(scored.group.trajectories))
        ]
        return cls(**{one.name: np.concatenate([row[one.name] for row in rows]) for one in fields(cls)})

    @classmethod
    def single_turn(
        cls,
        *,
        prompt_lengths: Int32Array,
        completion_lengths: Int32Array,
        rewards: Float32Array | None = None,
        **known: Any,
    ) -> SequenceBatch:
        """Completions without observed tokens: what is not ``known`` is that of finished on-policy data.

        Args:
            prompt_lengths: ``[N]``, P.
            completion_lengths: ``[N]``, T, at least 1.
            rewards: ``[N]``, of whole completions; unset: 0.
            known: Other fields, ``token_ids`` among them.
        """
        count, tokens = len(prompt_lengths), int(completion_lengths.sum())
        arrays = {
            "sampled": np.ones(tokens, dtype=np.bool_),
            "loss_mask": np.ones(tokens, dtype=np.bool_),
            "sampling_logprobs": np.zeros(tokens, dtype=np.float32),
            "staleness": np.zeros(tokens, dtype=np.int32),
            "token_rewards": np.zeros(tokens, dtype=np.float32),
            "on_policy": np.ones(count, dtype=np.bool_),
            "truncated": np.zeros(count, dtype=np.bool_),
            "group_ids": np.arange(count),
            "greedy_rewards": np.zeros(count, dtype=np.float32),
        }
        batch = cls(prompt_lengths=prompt_lengths, completion_lengths=completion_lengths, **arrays | known)
        return batch if rewards is None else batch.with_rewards(rewards)

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def lengths(self) -> Int32Array:
        """``[N]``, P + T."""
        return self.prompt_lengths + self.completion_lengths

    @property
    def sampled_lengths(self) -> Int32Array:
        """``[N]``, tokens that the policy sampled."""
        return self._sums(self.sampled).astype(np.int32)

    @property
    def loss_lengths(self) -> Int32Array:
        """``[N]``, tokens that enter the losses."""
        return self._sums(self.loss_mask).astype(np.int32)

    @property
    def rewards(self) -> Float32Array:
        """``[N]``, of whole trajectories."""
        return self._sums(self.token_rewards).astype(np.float32)

    def with_rewards(self, rewards: Float32Array, *, scale: float = 1.0) -> SequenceBatch:
        """Rewards of whole trajectories replaced.

        Args:
            rewards: ``[N]``.
            scale: Factor of the rewards of turns, which keep their places: the last sampled token gets what is left.
        """
        last = np.full(len(self), -1)
        last[self._sequence_of_token()[self.sampled]] = np.flatnonzero(self.sampled)  # The last of equal ones remains.
        has_any = last >= 0
        token_rewards = self.token_rewards * np.float32(scale)
        token_rewards[last[has_any]] = 0.0
        left = (rewards - self._sums(token_rewards)).astype(np.float32)
        token_rewards[last[has_any]] = left[has_any]
        return replace(self, token_rewards=token_rewards)

    def padded(self, flat: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """``[sum(T)]`` numbers of the tokens after prompts as ``[N, max(T)]``, 0 where there is no token."""
        padded = np.zeros((len(self), int(self.completion_lengths.max(initial=0))), dtype=flat.dtype)
        padded[np.arange(padded.shape[1]) < self.completion_lengths[:, None]] = flat
        return padded

    def select(self, indices: Sequence[int]) -> SequenceBatch:
        """The given sequences, in that order."""
        order = np.asarray(indices, dtype=np.int64)
        places = dict.fromkeys((one.name for one in fields(self)), order)
        places["token_ids"] = _places(self.lengths, order)
        places |= dict.fromkeys(_PER_COMPLETION_TOKEN, _places(self.completion_lengths, order))
        return SequenceBatch(**{name: getattr(self, name)[of_array] for name, of_array in places.items()})

    def _sums(self, values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        sums = np.bincount(self._sequence_of_token(), weights=values, minlength=len(self))
        return sums.astype(np.float64, copy=False)

    def _sequence_of_token(self) -> Int64Array:
        return np.repeat(np.arange(len(self)), self.completion_lengths)


def _row(scored: ScoredGroup, index: int, version: int, max_staleness: int) -> dict[str, npt.NDArray[Any]]:
    """A batch of one trajectory, by the names of the fields."""
    prompt, trajectory = scored.group.prompt, scored.group.trajectories[index]
    staleness = np.zeros(len(trajectory.token_ids), dtype=np.int32)
    for span in trajectory.version_spans:
        staleness[span.start : span.end] = version - span.version
    token_rewards = np.zeros(len(trajectory.token_ids), dtype=np.float32)
    for turn in trajectory.turns:
        token_rewards[turn.end - 1] = turn.reward
    token_rewards[trajectory.turns[-1].end - 1] += scored.rewards[index]
    sampled = trajectory.loss_mask
    return {
        "token_ids": np.concatenate([prompt.token_ids, trajectory.token_ids]),
        "prompt_lengths": np.asarray([len(prompt.token_ids)], dtype=np.int32),
        "completion_lengths": np.asarray([len(trajectory.token_ids)], dtype=np.int32),
        "sampled": sampled,
        "loss_mask": sampled & (staleness <= max_staleness),
        "sampling_logprobs": trajectory.sampling_logprobs,
        "staleness": staleness,
        "token_rewards": token_rewards,
        "on_policy": np.asarray([trajectory.asked_version == version and not staleness.any()]),
        "truncated": np.asarray([trajectory.truncated]),
        "group_ids": np.asarray([scored.group.group_id], dtype=np.int64),
        "greedy_rewards": np.asarray([scored.greedy_reward or 0.0], dtype=np.float32),
    }


def _places(lengths: Int32Array, order: Int64Array) -> Int64Array:
    """Where the given ones of some ragged rows lie in their flat array."""
    ends = np.cumsum(lengths, dtype=np.int64)
    pieces = [np.arange(ends[i] - lengths[i], ends[i]) for i in order]
    return np.concatenate(pieces) if pieces else order
