from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rlhf_ray.errors import DataError
from rlhf_ray.rewards.builtin.gold import gold_answers, number_text


@pytest.mark.parametrize(
    ("value", "answers"),
    [
        (" 12\n", ("12",)),
        (12, (Decimal(12),)),
        (12.0, (Decimal(12),)),
        (1e20, (Decimal(10**20),)),
        (np.float32(0.1), (Decimal("0.1"),)),
        (np.str_("12"), ("12",)),
        pytest.param(10**5000, (Decimal(10**5000),), id="10**5000"),
        (["12", 13], ("12", Decimal(13))),
        (("12",), ("12",)),
        (np.array([12, 13]), (Decimal(12), Decimal(13))),
        (np.array(["a", "b"], dtype=object), ("a", "b")),
        (pa.scalar(["12", "13"]), ("12", "13")),
        (pa.scalar(12.0), (Decimal(12),)),
    ],
)
def test_forms(value: Any, answers: tuple[Any, ...]) -> None:
    assert gold_answers(value, "answer") == answers


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "is of type|is null"),
        ("  ", "is empty"),
        ([], "is an empty list"),
        (np.array([]), "is an empty list"),
        (["12", None], "is null"),
        ([["12"]], "of type list"),
        (np.array([[1, 2]]), "of type ndarray"),
        ({"ground_truth": "12"}, "is a mapping.*ground_truth"),
        (True, "is a boolean"),
        (np.bool_(True), "of type bool"),
        (float("nan"), "is not a finite number"),
        (np.float64("inf"), "is not a finite number"),
        (Fraction(1, 3), "of type Fraction"),
        (b"12", "of type bytes"),
        (12j, "of type complex"),
        (pa.scalar(None), "is null"),
    ],
)
def test_other_forms_are_refused_by_name(value: Any, reason: str) -> None:
    with pytest.raises(DataError, match=rf"the row's 'label' .*({reason})"):
        gold_answers(value, "label")


def test_a_long_answer_is_cut_in_the_message() -> None:
    with pytest.raises(DataError) as caught:
        gold_answers({"text": "x" * 100_000}, "answer")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("number", "text"), [("12.0", "12"), ("1E+20", "1" + "0" * 20), ("0.50", "0.5"), ("100", "100")]
)
def test_numbers_as_text(number: str, text: str) -> None:
    assert number_text(Decimal(number)) == text
