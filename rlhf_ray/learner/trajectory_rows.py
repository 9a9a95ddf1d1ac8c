"""Rows of sequences <-> rows of trajectories: credit passes from one turn of a trajectory to the one before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch

from rlhf_ray.learner.batch import SequenceBatch

__all__ = ["TrajectoryRows"]

Int64Array = npt.NDArray[np.int64]


class TrajectoryRows:
    """Joins ``[N, T]`` of sequences to ``[R, W]`` of trajectories, and splits them again.

    The row of a trajectory holds the tokens after the prompts of its sequences, turn after turn as they were asked,
    each with the observed tokens that follow it, and padding on the right. So credit passes to the turn before, also
    where an agent goes back to a sequence after a turn of another. Where each trajectory has one sequence, rows stay as
    they are.

    A trajectory with turns in parallel has several rows: one for each turn that comes after no other, with all that
    comes after it. A turn that several lead to is in the rows of each, where the same comes after it::

        0 -> 1 -> 3        0 1 3
        2 ------> 3        2 3

    Args:
        batch: The sequences.
        device: Where their rows are.
    """

    ends: torch.Tensor
    """``[R]``, index of the sequence that each row ends in."""

    def __init__(self, batch: SequenceBatch, device: torch.device) -> None:
        def on_device(indices: npt.ArrayLike) -> torch.Tensor:
            return torch.from_numpy(np.asarray(indices, dtype=np.int64)).to(device)

        self._joins = len(batch.last_sequences) < len(batch)
        self.ends = on_device(batch.last_sequences)
        if not self._joins:
            return
        rows, last_tokens = zip(*_rows(batch), strict=True)
        lengths, widths = batch.completion_lengths, np.asarray([len(row) for row in rows])
        self._shape, self._joined_shape = (len(batch), int(lengths.max())), (len(rows), int(widths.max()))
        places = np.flatnonzero(np.arange(self._shape[1]) < lengths[:, None])
        joined_places = np.flatnonzero(np.arange(self._joined_shape[1]) < widths[:, None])
        tokens = np.concatenate(rows)
        homes = np.empty_like(places)
        homes[tokens] = joined_places
        self._places, self._joined_places = on_device(places), on_device(joined_places)
        self._sources, self._homes = on_device(places[tokens]), on_device(homes)
        self.ends = on_device(np.repeat(np.arange(len(batch)), lengths)[tokens[np.cumsum(widths) - 1]])
        row_starts = np.cumsum(widths) - widths
        ends = row_starts + [np.flatnonzero(batch.sampled[row])[-1] for row in rows]
        early = np.flatnonzero(tokens[ends] != last_tokens)
        self._early_ends = on_device(joined_places[ends[early]])
        self._last_tokens = on_device(places[np.asarray(last_tokens)[early]])

    def join(self, rows: torch.Tensor) -> torch.Tensor:
        """``[N, T]`` of sequences as ``[R, W]`` of trajectories, 0 in padding."""
        return self._moved(rows, self._sources, self._joined_places, self._joined_shape) if self._joins else rows

    def join_rewards(self, rewards: torch.Tensor, of_turns: torch.Tensor) -> torch.Tensor:
        """``[N, T]`` rewards of tokens as ``[R, W]``, where the reward of a trajectory's end is that of all its rows.

        Args:
            rewards: With penalties of tokens.
            of_turns: Without.
        """
        joined = self.join(rewards)
        if self._joins:
            joined.view(-1)[self._early_ends] += of_turns.flatten()[self._last_tokens]
        return joined

    def split(self, joined: torch.Tensor) -> torch.Tensor:
        """``[R, W]`` of trajectories as ``[N, T]`` of sequences, 0 in padding."""
        return self._moved(joined, self._homes, self._places, self._shape) if self._joins else joined

    @staticmethod
    def _moved(rows: torch.Tensor, source: torch.Tensor, target: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        moved = rows.new_zeros(shape)
        moved.view(-1)[target] = rows.flatten()[source]
        return moved


def _rows(batch: SequenceBatch) -> Iterator[tuple[Int64Array, np.int64]]:
    """The tokens of each row, and the last sampled one of its trajectory."""
    ends = np.cumsum(batch.per_trajectory(batch.completion_lengths)).astype(np.int64)
    for tokens in np.split(batch.in_time, ends[:-1]):
        last = tokens[batch.sampled[tokens]][-1]
        if (batch.follower_ids[tokens] < 0).all():
            yield tokens, last
            continue
        turns = np.maximum.accumulate(batch.turn_ids[tokens])  # Observed tokens are with the turn before.
        numbers, starts = np.unique(turns, return_index=True)
        pieces = dict(zip(numbers.tolist(), np.split(tokens, starts[1:]), strict=True))
        followers = batch.follower_ids[tokens[starts]].tolist()
        for chain in _chains(dict(zip(numbers.tolist(), followers, strict=True))):
            yield np.concatenate([pieces[turn] for turn in chain]), last


def _chains(followers: Mapping[int, int]) -> Iterator[list[int]]:
    """Turns, one after the other, from each one that comes after no other; where it ends, a turn follows itself."""
    first = followers.keys() - {after for turn, after in followers.items() if after != turn}
    for turn in sorted(first):
        chain = [turn]
        while (after := followers[chain[-1]]) in followers and after != chain[-1]:
            chain.append(after)
        yield chain
