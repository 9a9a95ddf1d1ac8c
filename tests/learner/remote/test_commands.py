from __future__ import annotations

import numpy as np
import pytest

from rlhf_ray.learner.remote.commands import UpdateResult, merge_results
from rlhf_ray.types import TokenEstimates


def of(*advantages: float) -> TokenEstimates:
    return TokenEstimates(advantages=np.asarray(advantages, dtype=np.float32))


def test_advantages_of_all_ranks_in_the_order_of_the_batch() -> None:
    first = UpdateResult(metrics={"lr": 0.5}, estimates=(of(3, 3.5), of(0)))
    idle = UpdateResult(metrics={"lr": 0.5}, estimates=())
    third = UpdateResult(metrics={"lr": 0.5}, estimates=(of(1), of(), of(2)))

    merged = merge_results([first, idle, third], [(3, 0), (), (1, 4, 2)])

    assert merged.metrics == {"lr": 0.5}
    assert [one.advantages.tolist() for one in merged.estimates or ()] == [[0], [1], [2], [3, 3.5], []]


def test_without_advantages_only_figures() -> None:
    ranks = [UpdateResult(metrics={"lr": 0.5})] * 2

    assert merge_results(ranks, [(0,), (1,)]) == UpdateResult(metrics={"lr": 0.5})


def test_a_rank_that_answers_for_another_number_of_sequences_is_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        merge_results([UpdateResult(metrics={}, estimates=(of(1),))], [(0, 1)])
