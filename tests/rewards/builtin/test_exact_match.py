from __future__ import annotations

import pytest

from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.rewards import exact_match


def test_compares_without_surrounding_white_space() -> None:
    scores = exact_match()(completions=["Paris", " Paris\n", "paris", "Paris."], answer=["Paris"] * 4)
    assert scores == [1.0, 1.0, 0.0, 0.0]


def test_reads_chat_completions() -> None:
    chats = [[{"role": "assistant", "content": "Paris"}], [{"role": "assistant", "content": "Rome"}]]
    assert exact_match()(completions=chats, answer=["Paris", "Paris"]) == [1.0, 0.0]


def test_ignores_case_when_asked() -> None:
    assert exact_match(ignore_case=True)(completions=["STRASSE"], answer=["straße"]) == [1.0]


def test_pattern_takes_the_first_group_of_its_last_match() -> None:
    reward = exact_match(pattern=r"<answer>(.*?)</answer>")
    completions = ["<answer>1</answer> no: <answer>\n2\n</answer>", "2", "<answer>1</answer>"]
    assert reward(completions=completions, answer=["2"] * 3) == [1.0, 0.0, 0.0]


def test_pattern_without_group_takes_the_match() -> None:
    assert exact_match(pattern=r"\d+")(completions=["between 7 and 12"], answer=[12]) == [1.0]


def test_no_match_is_not_an_empty_answer() -> None:
    assert exact_match(pattern=r"\d+")(completions=["none"], answer=[""]) == [0.0]


def test_reads_the_named_column() -> None:
    assert exact_match(answer_column="gold")(completions=["a"], answer=["b"], gold=["a"]) == [1.0]


def test_a_missing_column_is_named() -> None:
    with pytest.raises(DataError, match=r"'answer'.*columns: gold"):
        exact_match()(completions=["a"], gold=["a"])


def test_an_empty_answer_raises() -> None:
    with pytest.raises(DataError, match="'answer' is empty"):
        exact_match()(completions=["None"], answer=[None])


def test_a_bad_pattern_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"exact_match\.pattern"):
        exact_match(pattern="(")
