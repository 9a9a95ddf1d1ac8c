from __future__ import annotations

import asyncio
import time

import pytest

from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.rewards import math_equivalence

pytest.importorskip("math_verify")


@pytest.mark.parametrize(
    ("gold", "completion", "score"),
    [
        ("\\frac{1}{2}", "so \\boxed{0.5}", 1.0),
        ("$\\frac{1}{2}$", "The answer is $\\frac{2}{4}$.", 1.0),
        ("0.5", "\\boxed{\\frac{1}{3}}", 0.0),
        ("x^2+2x+1", "\\boxed{(x+1)^2}", 1.0),
        ("1,000", "The answer is 1000.", 1.0),
        (72, "\\boxed{72}", 1.0),
        ("72", "no idea", 0.0),
        ("72", "", 0.0),
    ],
)
def test_decides_equivalence(gold: object, completion: str, score: float) -> None:
    reward = math_equivalence()
    assert reward(completions=[completion], answer=[gold]) == [score]
    assert reward(completions=[[{"role": "assistant", "content": completion}]], answer=[gold]) == [score]


def test_works_in_a_thread() -> None:
    answer = asyncio.run(asyncio.to_thread(math_equivalence(), completions=["\\boxed{1/2}"], answer=["0.5"]))
    assert answer == [1.0]


def test_what_sympy_cannot_finish_scores_0() -> None:
    start = time.perf_counter()
    completions = ["$10^{10^{10}}$", "\\boxed{5}"]
    assert math_equivalence(timeout_s=1)(completions=completions, answer=["5", "5"]) == [0.0, 1.0]
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("gold", ["", None])
def test_an_unreadable_gold_answer_raises(gold: object) -> None:
    with pytest.raises(DataError, match="cannot read the row's 'answer'"):
        math_equivalence()(completions=["5"], answer=[gold])


def test_refuses_a_limit_below_a_second() -> None:
    with pytest.raises(ConfigError, match="timeout_s"):
        math_equivalence(timeout_s=0)
