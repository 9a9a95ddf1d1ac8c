from __future__ import annotations

import numpy as np
import torch

from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.learner.trajectory_rows import TrajectoryRows

CPU = torch.device("cpu")


def batch_of(lengths: list[int], trajectory_ids: list[int]) -> SequenceBatch:
    return SequenceBatch.single_turn(
        token_ids=np.zeros(sum(lengths) + len(lengths), dtype=np.int32),
        prompt_lengths=np.ones(len(lengths), dtype=np.int32),
        completion_lengths=np.asarray(lengths, dtype=np.int32),
        trajectory_ids=np.asarray(trajectory_ids, dtype=np.int64),
    )


def test_rows_are_joined_without_their_padding_and_split_again() -> None:
    rows = TrajectoryRows(batch_of([2, 1, 3, 2], [5, 5, 4, 9]), CPU)
    of_sequences = torch.tensor([[1, 2, 77], [3, 77, 77], [4, 5, 6], [7, 8, 77]])

    joined = rows.join(of_sequences)

    assert joined.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 0]]
    assert rows.split(joined).tolist() == [[1, 2, 0], [3, 0, 0], [4, 5, 6], [7, 8, 0]]
    assert rows.join(of_sequences > 4).dtype == torch.bool


def test_rows_of_one_sequence_each_stay_as_they_are() -> None:
    rows = TrajectoryRows(batch_of([2, 1], [0, 1]), CPU)
    of_sequences = torch.tensor([[1.0, 2.0], [3.0, 77.0]])

    assert rows.join(of_sequences) is of_sequences
    assert rows.split(of_sequences) is of_sequences


def test_a_rank_without_sequences_has_no_rows() -> None:
    rows = TrajectoryRows(batch_of([2, 1], [0, 0]).select([]), CPU)

    assert rows.join(torch.zeros(0, 0)).shape == (0, 0)
