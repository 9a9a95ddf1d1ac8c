from __future__ import annotations

import time

import pytest

from rlhf_ray.errors import ConfigError
from rlhf_ray.rewards import format


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("<think>a < b\nand so on</think>\n<answer>4</answer>", 1.0),
        ("  <think></think><answer></answer>\n", 1.0),
        ("<think>a</think><answer>4</answer> and more", 0.0),
        ("Well, <think>a</think><answer>4</answer>", 0.0),
        ("<think>a</think> so <answer>4</answer>", 0.0),
        ("<think>a</think><think>b</think><answer>4</answer>", 0.0),
        ("<think>a</think><answer>4</answer><answer>5</answer>", 0.0),
        ("<think>a<answer>4</answer></think><answer>5</answer>", 0.0),
        ("<answer>4</answer><think>a</think>", 0.0),
        ("<think>a</think><answer>4", 0.0),
        ("", 0.0),
    ],
)
def test_default_form(completion: str, score: float) -> None:
    assert format()(completions=[completion]) == [score]
    assert format()(completions=[[{"role": "assistant", "content": completion}]]) == [score]


def test_pattern_must_match_the_whole_completion() -> None:
    assert format(pattern=r"\d+")(completions=["12", "12.", "a12"]) == [1.0, 0.0, 0.0]


def test_long_malformed_completion_is_quick() -> None:
    start = time.perf_counter()
    assert format()(completions=["<think>" + "a <" * 50_000]) == [0.0]
    assert time.perf_counter() - start < 2.0


def test_a_pattern_that_takes_too_long_is_an_error_and_not_a_hang() -> None:
    reward = format(pattern=r"(x+x+)+y", timeout_s=0.1)
    started = time.perf_counter()
    with pytest.raises(TimeoutError, match=r"format\.pattern takes more than 0\.1 s"):
        reward(completions=["x" * 5000 + "y z"])
    assert time.perf_counter() - started < 5


def test_a_bad_pattern_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"format\.pattern"):
        format(pattern="[")
