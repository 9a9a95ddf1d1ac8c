import numpy as np

from rlhf_ray.prompts.row_store import RowStore


def test_rows_are_found_beside_empty_blocks() -> None:
    store = RowStore(["a", "b", "c", "d", "e"], [0, 2, 0, 3, 0])
    assert store.num_rows == 5
    blocks, numbers, places = store.locate(np.array([4, 0, 1, 2], dtype=np.int64))
    assert blocks == {1: "b", 3: "d"}
    assert numbers.tolist() == [3, 1, 1, 3]
    assert places.tolist() == [2, 0, 1, 0]


def test_only_blocks_that_are_needed_are_named() -> None:
    blocks, _, _ = RowStore(["a", "b"], [2, 2]).locate(np.array([3], dtype=np.int64))
    assert blocks == {1: "b"}


def test_a_store_without_rows() -> None:
    assert RowStore([], []).num_rows == 0
