from __future__ import annotations

import pytest

from rlhf_ray.rewards.reward_model.padding import batches, unused_token_id


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "expected"),
    [
        ([3, 9, 1, 8], 18, [[1, 3], [0, 2]]),  # 2 x 9, then 2 x 3
        ([3, 9, 1, 8], 17, [[1], [3, 0], [2]]),
        ([3, 9, 1, 8], 1000, [[1, 3, 0, 2]]),
        ([50, 2], 10, [[0], [1]]),
        ([4, 4, 4], 8, [[0, 1], [2]]),
        ([], 8, []),
    ],
)
def test_batches_by_hand(lengths: list[int], max_tokens: int, expected: list[list[int]]) -> None:
    assert list(batches(lengths, max_tokens)) == expected


def test_every_sequence_is_in_one_batch() -> None:
    lengths = [(7 * i) % 31 + 1 for i in range(200)]
    found = list(batches(lengths, 64))
    assert sorted(index for batch in found for index in batch) == list(range(200))
    assert all(max(lengths[i] for i in batch) * len(batch) <= 64 for batch in found)


def test_an_id_that_no_sequence_has() -> None:
    assert unused_token_id([[0, 1], [3]], 5) == 2
    assert unused_token_id([[0, 1], [2]], 3) is None
