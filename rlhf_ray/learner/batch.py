"""The sequences of one update, flat and variable-length: what travels from the Algorithm to a learner rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from rlhf_ray.types import BoolArray, Float32Array, Int32Array, ScoredGroup, Trajectory

__all__ = ["SequenceBatch"]

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]

_PER_COMPLETION_TOKEN = ("turn_ids", "follower_ids", "loss_mask", "sampling_logprobs", "staleness", "token_rewards")


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceBatch:
    """N sequences (a prompt and the tokens after it) of M trajectories, laid end to end.

    A trajectory has one sequence, or several where its history was rewritten: these are adjacent, in order.

    Example:
        After the prompt ``7 7`` the policy samples ``1 2``, observes ``9``, and samples ``3`` for a reward of 1::

            token_ids      7 7 1 2  9 3
            turn_ids           0 0 -1 1
            token_rewards      0 0  0 1
    """

    token_ids: Int32Array
    """``[sum(P + T)]``"""
    prompt_lengths: Int32Array
    """``[N]``, P"""
    completion_lengths: Int32Array
    """``[N]``, T: all tokens after the prompt, observed ones too"""
    turn_ids: Int32Array
    """``[sum(T)]``, number of the turn in its trajectory, from 0, in the order in which they were asked: ascending in a
    sequence, not always over those of a trajectory; -1 at observed tokens"""
    follower_ids: Int32Array
    """``[sum(T)]``, number of the turn that comes after the token's, its own where none does; -1: the next in order;
    -1 at observed tokens"""
    loss_mask: BoolArray
    """``[sum(T)]``, sampled, and enters the losses"""
    sampling_logprobs: Float32Array
    """``[sum(T)]``, 0 at observed tokens"""
    staleness: Int32Array
    """``[sum(T)]``, policy version that is trained minus the version that sampled the token; 0 at observed tokens"""
    token_rewards: Float64Array
    """``[sum(T)]``, rewards of turns at their last tokens; the last token of the trajectory's last turn has the rest of
    its reward. In double precision, so that they add up to a float32 reward exactly."""
    on_policy: BoolArray
    """``[N]``, sampled from the first token to the last by the policy that is trained"""
    truncated: BoolArray
    """``[N]``, nothing comes after it in a trajectory that a limit ended: bootstraps from the critic"""
    trajectory_ids: Int64Array
    """``[N]``, sequences of one trajectory have the same, unique in the batch"""
    group_ids: Int64Array
    """``[N]``, trajectories of one prompt have the same"""
    greedy_rewards: Float32Array
    """``[N]``, reward of the greedy completion of the prompt; 0 where none was sampled"""
    successful: BoolArray
    """``[N]``, the reward of the trajectory, before it is shaped, is high enough to imitate it"""

    @classmethod
    def from_groups(
        cls, groups: Sequence[ScoredGroup], *, version: int, max_staleness: int, min_success: float = math.inf
    ) -> SequenceBatch:
        """Lay out all sequences of all trajectories, in order.

        Args:
            groups: Trajectories and their rewards.
            version: Of the policy that is to be trained.
            max_staleness: Tokens that are staler, of trajectories that were carried over, do not enter the losses.
            min_success: Reward from which on a trajectory is successful.
        """
        trajectories = [(scored, trajectory) for scored in groups for trajectory in scored.group.trajectories]
        rows = [
            row
            for number, (scored, trajectory) in enumerate(trajectories)
            for row in _rows(scored, trajectory, number, version, max_staleness)
        ]
        batch = cls(**{one.name: np.concatenate([row[one.name] for row in rows]) for one in fields(cls)})
        rewards = np.concatenate([scored.rewards for scored in groups])
        return replace(batch.with_rewards(rewards), successful=(rewards >= min_success)[batch.of_trajectory])

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
            rewards: ``[N]``, of whole completions, each a trajectory of its own; unset: 0.
            known: Other fields, ``token_ids`` among them.
        """
        count, tokens = len(prompt_lengths), int(completion_lengths.sum())
        arrays = {
            "turn_ids": np.zeros(tokens, dtype=np.int32),
            "follower_ids": np.full(tokens, -1, dtype=np.int32),
            "loss_mask": np.ones(tokens, dtype=np.bool_),
            "sampling_logprobs": np.zeros(tokens, dtype=np.float32),
            "staleness": np.zeros(tokens, dtype=np.int32),
            "token_rewards": np.zeros(tokens, dtype=np.float64),
            "on_policy": np.ones(count, dtype=np.bool_),
            "truncated": np.zeros(count, dtype=np.bool_),
            "trajectory_ids": np.arange(count),
            "group_ids": np.arange(count),
            "greedy_rewards": np.zeros(count, dtype=np.float32),
            "successful": np.zeros(count, dtype=np.bool_),
        }
        batch = cls(prompt_lengths=prompt_lengths, completion_lengths=completion_lengths, **arrays | known)
        return batch if rewards is None else batch.with_rewards(rewards)

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def sampled(self) -> BoolArray:
        """``[sum(T)]``, sampled by the policy, not observed."""
        return self.turn_ids >= 0

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
    def of_trajectory(self) -> Int64Array:
        """``[N]``, index of each sequence's trajectory, from 0."""
        return np.cumsum(np.append(False, self._is_another))[: len(self)]

    @property
    def last_sequences(self) -> Int64Array:
        """``[M]``, index of the sequence with a trajectory's last turn: what holds for a trajectory is read there."""
        ends = np.flatnonzero(np.append(self._is_another, len(self) > 0))
        if len(ends) == len(self):
            return ends
        newest = np.full(len(self), -1)
        np.maximum.at(newest, self._sequence_of_token(), self.turn_ids)
        by_age: Int64Array = np.lexsort((newest, self.of_trajectory))
        return by_age[ends]

    @property
    def in_time(self) -> Int64Array:
        """``[sum(T)]``, indices of tokens, trajectory after trajectory, in the order of their turns.

        Observed tokens follow the turn before them.
        """
        if len(self.last_sequences) == len(self):
            return np.arange(len(self.turn_ids))
        # Ascending in a sequence: the largest so far is that of the turn before. Those of the next sequence are larger.
        offsets = self._sequence_of_token() * (int(self.turn_ids.max(initial=0)) + 2)
        turns = np.maximum.accumulate(self.turn_ids + offsets) - offsets
        order: Int64Array = np.lexsort((turns, self._trajectory_of_token()))
        return order

    @property
    def rewards(self) -> Float32Array:
        """``[M]``, of whole trajectories."""
        return self._trajectory_sums(self.token_rewards).astype(np.float32)

    def per_trajectory(self, values: npt.NDArray[Any]) -> Float64Array:
        """``[N]`` numbers of sequences, added up: ``[M]``."""
        return np.bincount(self.of_trajectory, weights=values, minlength=len(self.last_sequences)).astype(np.float64)

    def with_rewards(self, rewards: Float32Array, *, scale: float = 1.0) -> SequenceBatch:
        """Rewards of whole trajectories replaced.

        Args:
            rewards: ``[M]``.
            scale: Factor of the rewards of turns, which keep their places: the last turn's end gets what is left.
        """
        last = np.full(len(rewards), -1)
        in_time = self.in_time
        sampled = in_time[self.sampled[in_time]]
        last[self._trajectory_of_token()[sampled]] = sampled  # The last of equal ones remains.
        has_any = last >= 0
        token_rewards = self.token_rewards * scale
        token_rewards[last[has_any]] = 0.0
        left = rewards - self._trajectory_sums(token_rewards)
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

    @property
    def _is_another(self) -> BoolArray:
        """``[N - 1]``, whether a sequence after the first begins a trajectory."""
        is_another: BoolArray = self.trajectory_ids[1:] != self.trajectory_ids[:-1]
        return is_another

    def _sums(self, values: npt.NDArray[Any]) -> Float64Array:
        sums = np.bincount(self._sequence_of_token(), weights=values, minlength=len(self))
        return sums.astype(np.float64, copy=False)

    def _trajectory_sums(self, values: npt.NDArray[Any]) -> Float64Array:
        # Token by token: the last summand, what was left to a reward, brings the sum to that reward even where it is 0.
        in_time = self.in_time
        of, ordered = self._trajectory_of_token()[in_time], values[in_time]
        sums = np.bincount(of, weights=ordered, minlength=len(self.last_sequences))
        return sums.astype(np.float64, copy=False)

    def _trajectory_of_token(self) -> Int64Array:
        return np.repeat(self.of_trajectory, self.completion_lengths)

    def _sequence_of_token(self) -> Int64Array:
        return np.repeat(np.arange(len(self)), self.completion_lengths)


def _rows(
    scored: ScoredGroup, trajectory: Trajectory, number: int, version: int, max_staleness: int
) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """A batch of one sequence each, by the names of the fields; rewards are those of turns alone."""
    prompts = (scored.group.prompt.token_ids, *(one.prompt_token_ids for one in trajectory.further))
    numbers, followers = _order(trajectory)
    for prompt, sequence in zip(prompts, trajectory.sequences, strict=True):
        turn_ids = np.full(len(sequence.token_ids), -1, dtype=np.int32)
        follower_ids = np.full(len(sequence.token_ids), -1, dtype=np.int32)
        token_rewards = np.zeros(len(sequence.token_ids), dtype=np.float64)
        for turn in sequence.turns:
            turn_ids[turn.start : turn.end] = (turn_id := next(numbers))
            follower_ids[turn.start : turn.end] = followers[turn_id]
            if turn.start < turn.end:  # Else the trajectory's last token gets it.
                token_rewards[turn.end - 1] = turn.reward * scored.environment_weight
        staleness = np.zeros(len(sequence.token_ids), dtype=np.int32)
        for span in sequence.version_spans:
            staleness[span.start : span.end] = version - span.version
        yield {
            "token_ids": np.concatenate([prompt, sequence.token_ids]),
            "prompt_lengths": np.asarray([len(prompt)], dtype=np.int32),
            "completion_lengths": np.asarray([len(sequence.token_ids)], dtype=np.int32),
            "turn_ids": turn_ids,
            "follower_ids": follower_ids,
            "loss_mask": sequence.loss_mask & (staleness <= max_staleness),
            "sampling_logprobs": sequence.sampling_logprobs,
            "staleness": staleness,
            "token_rewards": token_rewards,
            "on_policy": np.asarray([sequence.asked_version == version and not staleness.any()]),
            # What comes after other sequences' turns is another turn.
            "truncated": np.asarray([trajectory.truncated and _is_last(turn_id, followers)]),
            "trajectory_ids": np.asarray([number], dtype=np.int64),
            "group_ids": np.asarray([scored.group.group_id], dtype=np.int64),
            "greedy_rewards": np.asarray([scored.greedy_reward or 0.0], dtype=np.float32),
            "successful": np.zeros(1, dtype=np.bool_),
        }


def _order(trajectory: Trajectory) -> tuple[Iterator[int], list[int]]:
    """The place of each turn in time, sequence after sequence; and by place, the ``follower_ids`` of its tokens."""
    turns = trajectory.all_turns
    asked = [index if turn.number is None else turn.number for index, turn in enumerate(turns)]
    in_time = np.argsort(asked, kind="stable")
    places = {asked[index]: place for place, index in enumerate(in_time)}
    followers = [turns[index].follower for index in in_time]
    return iter(np.argsort(in_time).tolist()), [-1 if number is None else places[number] for number in followers]


def _is_last(turn: int, followers: Sequence[int]) -> bool:
    return followers[turn] == turn or (followers[turn] < 0 and turn == len(followers) - 1)


def _places(lengths: Int32Array, order: Int64Array) -> Int64Array:
    """Where the given ones of some ragged rows lie in their flat array."""
    ends = np.cumsum(lengths, dtype=np.int64)
    pieces = [np.arange(ends[i] - lengths[i], ends[i]) for i in order]
    return np.concatenate(pieces) if pieces else order
