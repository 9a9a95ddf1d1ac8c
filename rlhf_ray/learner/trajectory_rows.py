"""Rows of sequences <-> rows of trajectories: credit passes from one turn of a trajectory to the one before."""

from __future__ import annotations

import numpy as np
import torch

from rlhf_ray.learner.batch import SequenceBatch

__all__ = ["TrajectoryRows"]


class TrajectoryRows:
    """Joins ``[N, T]`` of sequences to ``[M, W]`` of trajectories, and splits them again.

    The row of a trajectory holds the tokens after the prompts of its sequences, turn after turn as they were asked,
    each with the observed tokens that follow it, and padding on the right. So credit passes to the turn before, also
    where an agent goes back to a sequence after a turn of another. Where each trajectory has one sequence, rows stay as
    they are.

    Args:
        batch: The sequences.
        device: Where their rows are.
    """

    def __init__(self, batch: SequenceBatch, device: torch.device) -> None:
        lengths = batch.completion_lengths.astype(np.int64)
        of_trajectories = batch.per_trajectory(lengths).astype(np.int64)
        self._joins = len(of_trajectories) < len(batch)
        self._shape = len(batch), int(lengths.max(initial=0))
        self._joined_shape = len(of_trajectories), int(of_trajectories.max(initial=0))
        in_time = batch.in_time
        of = np.repeat(np.arange(len(of_trajectories)), of_trajectories)
        columns = np.arange(len(of)) - (np.cumsum(of_trajectories) - of_trajectories)[of]
        places = np.empty(len(of), dtype=np.int64)
        places[in_time] = of * self._joined_shape[1] + columns
        is_token = np.arange(self._shape[1]) < lengths[:, None]
        self._places = torch.from_numpy(np.flatnonzero(is_token)).to(device)
        self._joined_places = torch.from_numpy(places).to(device)

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
