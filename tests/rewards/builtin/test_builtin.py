"""What holds for every built-in reward, whatever a policy writes."""

from __future__ import annotations

import functools
import math
import random
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from rlhf_ray.rewards import exact_match, format, gsm8k, length, math_equivalence, overlong
from rlhf_ray.rewards.builtin.math_equivalence import _grader

REWARDS: dict[str, Callable[[], Any]] = {
    "exact_match": exact_match,
    "exact_match, a pattern": lambda: exact_match(pattern=r"<answer>([^<]*)</answer>"),
    "format": format,
    "gsm8k": gsm8k,
    "gsm8k, last_number": lambda: gsm8k(last_number=True),
    "length": length,
    "math_equivalence": math_equivalence,
    "overlong": lambda: overlong(max_tokens=8, buffer_tokens=4),
}
UNITS = [
    *" \t\n7,.{}()$\\#-*_ex=/^%",
    *["\u00a0", "<answer>", "<think>", "</answer>", "<answer>7</answer>", "####", "#### ", "#### 7 ", "#### 7\n", "7 "],
    *["1,", ",000", "$7", "$7$ ", "\\boxed{", "\\boxed{7}", "\\boxed", "\\(", "\\[", "\\frac{", "{7", "7-", "\\times"],
    *["answer is ", "the answer: ", "and ", " \n", "\\boxed ", "\\frac{1}{2},", "\\$"],
]
AROUND = [
    ("", ""),
    ("", "7"),
    ("#### ", ""),
    ("#### 7", ""),
    ("#### 7", "7"),
    ("#### ", "x7"),
    ("7 \\boxed{7} ", ""),
    ("<think>", ""),
]
NUM_CHARS = 100_000
LIMIT_S = 0.1

every_reward = pytest.mark.parametrize("name", REWARDS)
built = functools.cache(lambda name: REWARDS[name]())


def score(name: str, *texts: str) -> list[float]:
    ids = [list(range(len(text) % 13)) for text in texts]
    return built(name)(completions=list(texts), completion_ids=ids, answer=["72"] * len(texts))


def cpu_s(name: str, text: str) -> float:
    started = used_s()
    score(name, text)
    return used_s() - started


def used_s() -> float:
    """CPU seconds of this process and of the one that runs SymPy."""
    process = _grader()._process
    if process is None:
        return time.process_time()
    times = psutil.Process(process.pid).cpu_times()
    return time.process_time() + times.user + times.system


@every_reward
def test_100_000_characters_take_less_than_a_tenth_of_a_second(name: str) -> None:
    score(name, "72")
    slow = {}
    for unit in UNITS:
        for prefix, suffix in AROUND:
            text = prefix + (unit * NUM_CHARS)[: NUM_CHARS - len(prefix) - len(suffix)] + suffix
            seconds = next((s for _ in range(4) if (s := cpu_s(name, text)) < LIMIT_S), None)
            if seconds is None:
                slow[prefix, unit, suffix] = cpu_s(name, text)
    assert slow == {}


@every_reward
def test_any_text_has_the_same_finite_score_twice(name: str) -> None:
    generator = random.Random(0)
    pieces = [
        *UNITS,
        "72",
        "\\boxed{72}",
        "#### 72",
        "\ud800",
        "\x00",
        "\u0663",
        "²",
        "x+1",
        "\\sqrt{",
        "}",
        "^{9^9}",
        "!",
    ]
    around = [("", ""), ("#### ", ""), ("$", "$"), ("\\boxed{", "}")]
    texts = []
    for before, after in around * 100:
        texts.append(before + "".join(generator.choices(pieces, k=generator.randrange(1, 12))) + after)
    first = score(name, *texts)
    assert all(math.isfinite(value) for value in first)
    assert [score(name, text)[0] for text in texts] == first
