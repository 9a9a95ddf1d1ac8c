from __future__ import annotations

from dataclasses import replace

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


def in_parallel(*, waits: bool = True) -> SequenceBatch:
    """Turns 0 and 3 in a sequence with an observed token before and after, 1 and 2 in others; another trajectory.

    Without ``waits`` nothing comes after 1 and 2, and 3 only after 0.
    """
    batch = batch_of([5, 1, 2, 2], [5, 5, 5, 4])
    after = {0: 1, 1: 3, 2: 3, 3: 3} if waits else {0: 3, 1: 1, 2: 2, 3: 3}
    turn_ids = [0, 0, -1, 3, -1, 1, 2, 2, 0, 0]
    follower_ids = [after.get(turn, -1) for turn in turn_ids[:-2]] + [-1, -1]
    ids = {"turn_ids": turn_ids, "follower_ids": follower_ids}
    return replace(batch, **{name: np.asarray(each, dtype=np.int32) for name, each in ids.items()})


TOKENS = torch.tensor([[1, 2, 3, 4, 5], [6, 77, 77, 77, 77], [7, 8, 77, 77, 77], [9, 10, 77, 77, 77]])


def test_turns_in_parallel_have_rows_of_their_own_and_share_what_comes_after() -> None:
    rows = TrajectoryRows(in_parallel(), CPU)

    joined = rows.join(TOKENS)

    assert joined.tolist() == [[1, 2, 3, 6, 4, 5], [7, 8, 4, 5, 0, 0], [9, 10, 0, 0, 0, 0]]
    assert rows.split(joined).tolist() == [[1, 2, 3, 4, 5], [6, 0, 0, 0, 0], [7, 8, 0, 0, 0], [9, 10, 0, 0, 0]]
    assert rows.ends.tolist() == [0, 0, 3]
    assert rows.join_rewards(TOKENS, TOKENS * 1000).equal(joined)


def test_rows_that_end_before_the_trajectory_does_have_the_reward_of_its_end() -> None:
    rows = TrajectoryRows(in_parallel(waits=False), CPU)
    joined = rows.join(TOKENS)

    assert joined.tolist() == [[1, 2, 3, 4, 5], [6, 0, 0, 0, 0], [7, 8, 0, 0, 0], [9, 10, 0, 0, 0]]
    assert rows.ends.tolist() == [0, 1, 2, 3]
    assert rows.join_rewards(TOKENS, TOKENS * 1000).tolist() == [
        [1, 2, 3, 4, 5],
        [4006, 0, 0, 0, 0],
        [7, 4008, 0, 0, 0],
        [9, 10, 0, 0, 0],
    ]
    assert rows.split(joined).tolist() == joined.tolist()


def test_several_rows_may_lead_to_an_early_end() -> None:
    batch = batch_of([1, 1, 1, 1], [0, 0, 0, 0])
    batch = replace(batch, turn_ids=np.arange(4, dtype=np.int32), follower_ids=np.asarray([2, 2, 2, 3], dtype=np.int32))
    rows = TrajectoryRows(batch, CPU)

    joined = rows.join_rewards(torch.tensor([[1], [2], [3], [4]]), torch.tensor([[10], [20], [30], [40]]))

    assert joined.tolist() == [[1, 43], [2, 43], [4, 0]]
