from __future__ import annotations

import pytest

from rlhf_ray.errors import ConfigError
from rlhf_ray.rewards import length


def test_costs_by_the_token() -> None:
    reward = length(penalty_per_token=0.25, free_tokens=2)
    assert reward(completion_ids=[[5], [5, 5], [5, 5, 5], [5] * 10]) == [0.0, 0.0, -0.25, -2.0]


def test_counts_tokens_and_not_characters() -> None:
    assert length(penalty_per_token=1.0)(completions=["a long text"], completion_ids=[[9]]) == [-1.0]


@pytest.mark.parametrize("arguments", [{"free_tokens": -1}, {"penalty_per_token": float("nan")}])
def test_refuses_impossible_arguments(arguments: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        length(**arguments)
