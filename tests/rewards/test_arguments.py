from __future__ import annotations

import pytest

from rlhf_ray.errors import DataError
from rlhf_ray.rewards.arguments import column, completion_texts


def test_texts_of_both_forms() -> None:
    assert completion_texts(["a", ""]) == ["a", ""]
    assert completion_texts([[{"role": "assistant", "content": "a"}]]) == ["a"]


def test_the_last_message_of_a_longer_chat_counts() -> None:
    chat = [
        {"role": "assistant", "content": "call"},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "b"},
    ]
    assert completion_texts([chat]) == ["b"]


def test_column() -> None:
    assert column({"answer": ["1", "2"]}, "answer") == ["1", "2"]


def test_a_missing_column_lists_those_there() -> None:
    with pytest.raises(DataError, match=r"'answer', which is not there \(columns: a, b\)"):
        column({"b": [1], "a": [1]}, "answer")
    with pytest.raises(DataError, match=r"columns: none"):
        column({}, "answer")
