from __future__ import annotations

import json
import os
import re
import time
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from rlhf_ray.errors import DataError
from rlhf_ray.rewards import gsm8k
from rlhf_ray.rewards.builtin.gsm8k import completion_answer, gold_number, parse_number

FINAL = re.compile(r"#### (-?[\d,]+)$")


@pytest.fixture(scope="module")
def answers() -> list[str]:
    """All 8,792 worked answers of GSM8K."""
    default = Path(__file__).resolve().parents[4] / "shared" / "data" / "gsm8k"
    folder = Path(os.environ.get("RLHF_RAY_GSM8K", default))
    files = [folder / "train.jsonl", folder / "test.jsonl"]
    if not all(file.is_file() for file in files):
        pytest.skip(f"GSM8K is not at {folder}: set RLHF_RAY_GSM8K to the folder with train.jsonl and test.jsonl")
    rows = [json.loads(line)["answer"] for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 8792
    return rows


def with_final(answer: str, change: object) -> str:
    """``answer`` with its final number passed through ``change``."""
    number = int(FINAL.search(answer)[1].replace(",", ""))
    return FINAL.sub(f"#### {change(number)}", answer)


def test_every_gold_answer_scores_1(answers: list[str]) -> None:
    for reward in (gsm8k(), gsm8k(last_number=True)):
        assert reward(completions=answers, answer=answers) == [1.0] * len(answers)


def test_every_gold_answer_scores_1_in_other_spellings(answers: list[str]) -> None:
    for spell in ("{:,}", "{}.", "{}.00", "${:,}", "{} clips", "{}%"):
        spelled = [with_final(answer, spell.format) for answer in answers]
        assert gsm8k()(completions=spelled, answer=answers) == [1.0] * len(answers), spell


@pytest.mark.parametrize(
    "change",
    [lambda n: n + 1, lambda n: n - 1, lambda n: f"{n}0" if n else "1", lambda n: f"{n}.01", lambda n: f"{n}/3"],
    ids=["plus-1", "minus-1", "digit-more", "hundredth-more", "third"],
)
def test_every_changed_answer_scores_0(answers: list[str], change: object) -> None:
    changed = [with_final(answer, change) for answer in answers]
    assert gsm8k()(completions=changed, answer=answers) == [0.0] * len(answers)


def test_every_negated_answer_scores_0(answers: list[str]) -> None:
    pairs = [(with_final(answer, lambda n: -n), answer) for answer in answers if gold_number(answer, "answer") != 0]
    negated, golds = zip(*pairs, strict=True)
    assert not any(gsm8k()(completions=negated, answer=golds))


def test_every_bare_answer_needs_last_number(answers: list[str]) -> None:
    bare = [answer.replace("#### ", "The answer is ") for answer in answers]
    assert not any(gsm8k()(completions=bare, answer=answers))
    assert all(gsm8k(last_number=True)(completions=bare, answer=answers))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("72", "72"),
        ("  72 clips", "72"),
        ("72.", "72"),
        ("$1,234.50", "1234.50"),
        ("\\$5", "5"),
        ("€ 5", "5"),
        ("1,234,567", "1234567"),
        ("50%", "50"),
        ("3.0", "3"),
        (".5", "0.5"),
        ("-7", "-7"),
        ("\u22127", "-7"),
        ("-$7", "-7"),
        ("$-7", "-7"),
        ("+7", "7"),
        ("007", "7"),
        ("60 miles/hour", "60"),
        ("72 (6 each)", "72"),
    ],
)
def test_reads_a_number(text: str, number: str) -> None:
    assert parse_number(text) == Decimal(number)


@pytest.mark.parametrize(
    "text",
    ["", "seventy", "1/2", "1 / 2", "3 + 4", "2*3", "2^3", "12-15", "10:30", "1,23", "12,3456", "1.2.3", "1e5", "3 1/2",
     "--7", "5 million", "5 Thousand dollars", "x = 5", "$", "=5"],
)  # fmt: skip
def test_refuses_what_is_no_single_number(text: str) -> None:
    assert parse_number(text) is None


def test_values_are_exact() -> None:
    gold = "#### 0.3"
    assert gsm8k()(completions=["#### 0.30", "#### 0.3000000000000000000001"], answer=[gold] * 2) == [1.0, 0.0]
    big = "9" * 30
    assert gsm8k()(completions=[f"#### {big}", f"#### {big[:-1]}8"], answer=[f"#### {big}"] * 2) == [1.0, 0.0]


def test_a_number_too_long_for_int_is_only_wrong() -> None:
    assert gsm8k()(completions=["#### " + "9" * 5000], answer=["#### 9"]) == [0.0]


def test_the_last_marker_counts() -> None:
    text = "#### 5\nNo, wait.\n#### 6"
    assert gsm8k()(completions=[text, text], answer=["6", "5"]) == [1.0, 0.0]


def test_forms_are_read_as_the_docs_say(gsm8k_row: tuple[str, ...]) -> None:
    completion, *numbers = gsm8k_row
    for last_number, number in zip((False, True), numbers, strict=True):
        expected = None if number == "none" else Decimal(number)
        assert completion_answer(completion, last_number=last_number) == expected
        gold = "72" if expected is None else number
        assert gsm8k(last_number=last_number)(completions=[completion], answer=[gold]) == [float(expected is not None)]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 and then 4.", "4"),
        ("so 10-4=6", "6"),
        ("so 10-4", "4"),
        ("it is -4", "-4"),
        ("it costs $1,200.", "1200"),
        ("loses $-3!", "-3"),
        ("#### 8 and 9", "8"),
    ],
)
def test_last_number(text: str, number: str) -> None:
    assert completion_answer(text, last_number=True) == Decimal(number)


@pytest.mark.parametrize("text", ["none", "....", "version 1.2.3", "#### unknown, maybe 1.2.3"])
def test_last_number_finds_nothing(text: str) -> None:
    assert completion_answer(text, last_number=True) is None


def test_last_number_of_a_long_run_of_dots_is_quick() -> None:
    assert completion_answer("." * 200_000, last_number=True) is None


def test_no_marker_scores_0_by_default() -> None:
    assert gsm8k()(completions=["72", ""], answer=["#### 72"] * 2) == [0.0, 0.0]


def test_reads_chat_completions() -> None:
    assert gsm8k()(completions=[[{"role": "assistant", "content": "#### 72"}]], answer=["#### 72"]) == [1.0]


@pytest.mark.parametrize("gold", ["72", "#### 72", 72, 72.0, Decimal("72.00"), np.int64(72), np.float32(72), ["5", 72]])
def test_gold_may_be_a_number_or_a_list(gold: object) -> None:
    assert gsm8k()(completions=["#### 72", "#### 6"], answer=[gold] * 2) == [1.0, 0.0]
    gsm8k().check_row({"answer": gold})


@pytest.mark.parametrize(
    "gold", ["", "####", "#### unknown", "about 72", None, True, float("nan"), [], ["72", "x"], {"ground_truth": "72"}]
)
def test_an_unreadable_gold_answer_raises(gold: object) -> None:
    for reward in (gsm8k(), gsm8k(last_number=True)):
        with pytest.raises(DataError, match=r"the row's 'answer' (is|holds no number)"):
            reward(completions=["#### 72"], answer=[gold])
        with pytest.raises(DataError, match=r"the row's 'answer' (is|holds no number)"):
            reward.check_row({"answer": gold})


def test_white_space_is_read_in_linear_time() -> None:
    for text in ("#### " + " " * 400, "#### 7" + " " * 100_000, "7" + " " * 100_000):
        started = time.process_time()
        completion_answer(text, last_number=True)
        assert time.process_time() - started < 1
