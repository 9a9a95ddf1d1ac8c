from __future__ import annotations

import pytest

from rlhf_ray.types import RewardFailure
from rlhf_ray.untrusted_text import shortened


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("one\n  two\t", "one two"),
        (ValueError("bad\x1b[31m"), "bad\ufffd[31m"),
        ("\ud800é", "\ufffdé"),
        ("ab" * 8, "aba [10 characters] bab"),
        ("", ""),
    ],
)
def test_shortened(text: object, line: str) -> None:
    assert shortened(text, 6 if text == "ab" * 8 else 500) == line


def test_text_of_any_length_makes_one_short_line() -> None:
    line = shortened("begin " + "x\n" * 100_000 + " end")
    assert len(line) < 550
    assert line.startswith("begin ")
    assert line.endswith(" end")


def test_the_message_of_a_failed_reward_is_one_short_line() -> None:
    failure = RewardFailure(group_id=1, kind="raised", message="judge raised\n" + "\x07" * 60_000 + " (judge.py:3)")
    assert len(failure.message) < 1100
    assert "\n" not in failure.message
    assert "\x07" not in failure.message
    assert failure.message.startswith("judge raised ")
    assert failure.message.endswith(" (judge.py:3)")
