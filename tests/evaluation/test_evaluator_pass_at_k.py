from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pytest

from rlhf_ray.evaluation.evaluator import pass_at_k


def test_numbers_by_hand() -> None:
    # n = 4, k = 2: of the 6 pairs, 0, 3, 5, 6 and 6 hold a sample that passes.
    estimates = pass_at_k(np.array([0, 1, 2, 3, 4]), 4, 2)
    assert estimates == pytest.approx([0, 1 / 2, 5 / 6, 1, 1])


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6])
def test_it_is_the_share_of_subsets_with_a_sample_that_passes(k: int) -> None:
    n = 6
    for num_passed in range(n + 1):
        samples = [i < num_passed for i in range(n)]
        subsets = list(combinations(samples, k))
        share = sum(any(subset) for subset in subsets) / len(subsets)
        assert pass_at_k(np.array([num_passed]), n, k)[0] == pytest.approx(share)
        assert share == pytest.approx(1 - comb(n - num_passed, k) / comb(n, k))


def test_one_of_one_is_the_share_that_passes_and_all_is_whether_any_does() -> None:
    passed = np.array([0, 3, 8])
    assert pass_at_k(passed, 8, 1) == pytest.approx(passed / 8)
    assert pass_at_k(passed, 8, 8).tolist() == [0.0, 1.0, 1.0]


def test_many_samples_neither_overflow_nor_leave_the_unit_interval() -> None:
    estimates = pass_at_k(np.arange(1001), 1000, 500)
    assert np.isfinite(estimates).all()
    assert (np.diff(estimates) >= 0).all()
    assert (estimates[0], estimates[-1]) == (0.0, 1.0)


@pytest.mark.parametrize(("passed", "k"), [([1], 0), ([1], 5), ([5], 2), ([-1], 2)])
def test_what_is_out_of_range(passed: list[int], k: int) -> None:
    with pytest.raises(ValueError, match="is not within"):
        pass_at_k(np.array(passed), 4, k)
