import numpy as np
import pytest

from rlhf_ray.prompts.rows import PromptOrder
from rlhf_ray.types import PromptPosition


def test_unshuffled_order_is_the_dataset_again_and_again() -> None:
    order = PromptOrder(3, seed=0, shuffle=False)
    assert order.dataset_rows(1, 8).tolist() == [1, 2, 0, 1, 2, 0, 1]


def test_each_epoch_is_a_permutation_and_no_two_are_equal() -> None:
    order = PromptOrder(50, seed=7, shuffle=True)
    epochs = [order.dataset_rows(epoch * 50, (epoch + 1) * 50) for epoch in range(3)]
    for rows in epochs:
        assert sorted(rows) == list(range(50))
        assert rows.tolist() != list(range(50))
    assert len({tuple(rows) for rows in epochs}) == 3


def test_the_order_depends_on_the_seed_alone() -> None:
    first, same, other = (PromptOrder(50, seed=seed, shuffle=True).dataset_rows(0, 100) for seed in (3, 3, 4))
    assert first.tolist() == same.tolist()
    assert first.tolist() != other.tolist()


def test_the_order_of_a_seed_never_changes() -> None:
    # Saved positions are only good as long as these numbers stay.
    assert PromptOrder(8, seed=0, shuffle=True).dataset_rows(0, 16).tolist() == [
        3,
        2,
        1,
        6,
        0,
        7,
        4,
        5,
        7,
        4,
        5,
        1,
        6,
        2,
        0,
        3,
    ]


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 1), (4, 5), (4, 6), (5, 10), (3, 17), (12, 13), (9, 30)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_any_stretch_is_a_slice_of_the_whole(start: int, stop: int, shuffle: bool) -> None:
    order = PromptOrder(5, seed=1, shuffle=shuffle)
    whole = np.concatenate([order.dataset_rows(epoch * 5, epoch * 5 + 5) for epoch in range(6)])
    stretch = PromptOrder(5, seed=1, shuffle=shuffle).dataset_rows(start, stop)
    assert stretch.dtype == np.int64
    assert stretch.tolist() == whole[start:stop].tolist()


def test_positions_and_prompt_ids_are_two_names_of_one_thing() -> None:
    order = PromptOrder(10, seed=0, shuffle=True)
    assert order.prompt_id(PromptPosition(epoch=2, row=7)) == 27
    assert order.position(27) == PromptPosition(epoch=2, row=7)
    assert order.position(30) == PromptPosition(epoch=3, row=0)
