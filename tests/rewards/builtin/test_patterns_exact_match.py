from __future__ import annotations

import time
from decimal import Decimal

import numpy as np
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


def test_no_match_scores_0() -> None:
    reward = exact_match(pattern=r"(\d*)!")
    assert reward(completions=["none", "!", "None"], answer=["None", "7", "None"]) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("gold", [12, 12.0, np.int64(12), np.float32(12), Decimal("12.00")])
def test_a_number_equals_any_plain_spelling_of_its_value(gold: object) -> None:
    completions = ["12", " 12.0\n", "+12.", "012", "12.5", "1.2e1", "twelve", ""]
    scores = exact_match()(completions=completions, answer=[gold] * len(completions))
    assert scores == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_a_text_is_compared_character_by_character() -> None:
    assert exact_match()(completions=["12", "007"], answer=["12.0", "7"]) == [0.0, 0.0]


@pytest.mark.parametrize("golds", [["12", "13"], ("12", "13"), np.array(["12", "13"]), [12.0, 13]])
def test_a_list_means_any_of_these(golds: object) -> None:
    assert exact_match()(completions=["12", "13", "1"], answer=[golds] * 3) == [1.0, 1.0, 0.0]


def test_reads_the_named_column() -> None:
    assert exact_match(answer_column="gold")(completions=["a"], answer=["b"], gold=["a"]) == [1.0]


def test_a_missing_column_is_named() -> None:
    with pytest.raises(DataError, match=r"'answer'.*columns: gold"):
        exact_match()(completions=["a"], gold=["a"])


@pytest.mark.parametrize("gold", [None, "", " \n", [], {"ground_truth": "12"}, float("nan"), True, [["12"]]])
def test_an_answer_of_another_form_is_refused(gold: object) -> None:
    for reward in (exact_match(), exact_match(pattern="(.*)")):
        with pytest.raises(DataError, match="the row's 'answer' is"):
            reward(completions=[str(gold)], answer=[gold])
        with pytest.raises(DataError, match="the row's 'answer' is"):
            reward.check_row({"answer": gold})


def test_a_pattern_that_takes_too_long_is_an_error_and_not_a_hang() -> None:
    reward = exact_match(pattern=r"<answer>(.*?)</answer>", timeout_s=0.1)
    assert reward(completions=["<answer>12</answer>"], answer=["12"]) == [1.0]
    started = time.perf_counter()
    with pytest.raises(TimeoutError, match=r"exact_match\.pattern takes more than 0\.1 s .* of 100000 characters"):
        reward(completions=["<answer>" * 12_500], answer=["12"])
    assert time.perf_counter() - started < 5


def test_refuses_a_limit_of_nothing() -> None:
    with pytest.raises(ConfigError, match=r"exact_match\.timeout_s"):
        exact_match(pattern="a", timeout_s=0)


def test_a_bad_pattern_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"exact_match\.pattern"):
        exact_match(pattern="(")
