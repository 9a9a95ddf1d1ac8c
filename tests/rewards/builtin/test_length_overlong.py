from __future__ import annotations

import pytest

from rlhf_ray.errors import ConfigError
from rlhf_ray.rewards import overlong


@pytest.mark.parametrize(
    ("num_tokens", "score"),
    [(0, 0.0), (12, 0.0), (13, -0.125), (16, -0.5), (19, -0.875), (20, -1.0), (21, -1.0), (99, -1.0)],
)
def test_falls_linearly_over_the_buffer(num_tokens: int, score: float) -> None:
    assert overlong(max_tokens=20, buffer_tokens=8)(completion_ids=[[5] * num_tokens]) == [score]


def test_the_papers_numbers() -> None:
    reward = overlong(max_tokens=20480, buffer_tokens=4096)
    assert reward(completion_ids=[[1] * 16384, [1] * 18432, [1] * 20480]) == [0.0, -0.5, -1.0]


@pytest.mark.parametrize(
    ("max_tokens", "buffer_tokens", "named"), [(8, 0, "buffer_tokens"), (8, 9, "buffer_tokens"), (0, 1, "max_tokens")]
)
def test_refuses_impossible_arguments(max_tokens: int, buffer_tokens: int, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        overlong(max_tokens=max_tokens, buffer_tokens=buffer_tokens)
