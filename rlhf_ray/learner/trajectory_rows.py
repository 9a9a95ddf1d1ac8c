"""Rows of sequences <-> rows of trajectories: credit passes from one sequence of a trajectory to the one before."""

from __future__ import annotations

import numpy as np
import torch

from rlhf_ray.learner.batch import SequenceBatch

__all__ = ["TrajectoryRows"]


class TrajectoryRows:
    """Joins ``[N, T]`` of sequences to ``[M, W]`` of trajectories, and splits them again.

    The row of a trajectory holds the tokens after the prompts of its sequences, one sequence after the other, observed
    tokens included, and padding on the right. Where each trajectory has one sequence, rows stay as they are.

    Args:
        batch: The sequences.
        device: Where their rows are.
    """

    def __init__(self, batch: SequenceBatch, device: torch.device) -> None:
        lengths, of, last = batch.completion_lengths.astype(np.int64), batch.of_trajectory, batch.last_sequences
        self._joins = len(last) < len(batch)
        starts = np.cumsum(lengths) - lengths
        offsets = starts - starts[np.append(0, last[:-1] + 1)][of] if len(batch) else starts
        self._shape = len(batch), int(lengths.max(initial=0))
        self._joined_shape = len(last), int((offsets + lengths).max(initial=0))
        columns = np.arange(self._shape[1])
        is_token = columns < lengths[:, None]
        places = (of * self._joined_shape[1] + offsets)[:, None] + columns
        self._places = torch.from_numpy(np.flatnonzero(is_token)).to(device)
        self._joined_places = torch.from_numpy(places[is_token]).to(device)

    def join(self, rows: torch.Tensor) -> torch.Tensor:
        """``[N, T]`` of sequences as ``[M, W]`` of trajectories, 0 in padding."""
        return self._moved(rows, self._places, self._joined_places, self._joined_shape)

    def split(self, joined: torch.Tensor) -> torch.Tensor:
        """``[M, W]`` of trajectories as ``[N, T]`` of sequences, 0 in padding."""
        return self._moved(joined, self._joined_places, self._places, self._shape)

    def _moved(
        self, rows: torch.Tensor, source: torch.Tensor, target: torch.Tensor, shape: tuple[int, int]
    ) -> torch.Tensor:
        if not self._joins:
            return rows
        moved = rows.new_zeros(shape)
        moved.view(-1)[target] = rows.flatten()[source]
        return moved
