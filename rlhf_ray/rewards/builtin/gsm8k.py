"""Built-in reward: GSM8K's final answer, compared as an exact number."""

from __future__ import annotations

import numbers
import re
from decimal import Decimal
from typing import Any

from rlhf_ray.errors import DataError
from rlhf_ray.rewards.arguments import Completions, column, completion_texts
from rlhf_ray.rewards.registry import built_in
from rlhf_ray.settings import RewardFunction

__all__ = ["completion_answer", "gold_answer", "gsm8k", "parse_number"]

MARKER = "####"

_CURRENCY = r"\\?[$€£¥₹]"
_MINUS = "-\u2212"
_NUMBER = r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+"
_ANSWER = re.compile(
    rf"""
    \s* (?:{_CURRENCY})? \s* (?P<sign>[{_MINUS}+]?) \s* (?:{_CURRENCY})? \s*
    (?P<number>{_NUMBER})
    # What follows may be a unit, but must not make the number a part of something else:
    (?! \s* [-+*/\u00d7\u00f7^=:.,]? \s* [0-9] )                    # 1/2, 3 + 4, 1,23, 10:30
    (?! [eE][-+]?[0-9] )                                              # 1e5
    (?! \s* (?:hundred|thousand|million|billion|trillion)\b )         # 5 million
    """,
    re.VERBOSE | re.IGNORECASE,
)
# A minus after a digit, a letter or a bracket is a subtraction or a hyphen: 10-4 ends in 4.
_LAST_NUMBER = re.compile(rf"(?:(?<![0-9A-Za-z)])[{_MINUS}])?(?:{_CURRENCY}[{_MINUS}]?)?[0-9.,]+")


@built_in
def gsm8k(*, answer_column: str = "answer", last_number: bool = False) -> RewardFunction:
    """1 where the completion's final number equals the row's, else 0.

    The final number is what follows the last ``####`` on its line, as in the dataset ("Training Verifiers to Solve
    Math Word Problems", arXiv:2110.14168). Currency signs, thousands separators and units do not count, ``50%`` is 50,
    and values are compared exactly: ``3.0`` is 3, ``0.33`` is not 1/3.

    Args:
        answer_column: Dataset column with the answer: the dataset's worked solution, or the number alone.
        last_number: Where a completion has no ``####``, take its last number. Off: it scores 0.

    Raises:
        DataError: When called, for a row whose answer holds no number.
    """

    def reward(*, completions: Completions, **columns: Any) -> list[float]:
        golds = [gold_answer(gold) for gold in column(columns, answer_column)]
        found = [completion_answer(text, last_number=last_number) for text in completion_texts(completions)]
        return [float(answer == gold) for answer, gold in zip(found, golds, strict=True)]

    return reward


def gold_answer(value: object) -> Decimal:
    """The number of a dataset row's answer: a text with ``####``, a text that is a number, or a number.

    Raises:
        DataError: There is no number.
    """
    number: Decimal | None = None
    if isinstance(value, str):
        number = parse_number(_after_marker(value) if MARKER in value else value)
    elif isinstance(value, (numbers.Real, Decimal)) and not isinstance(value, bool):
        number = Decimal(str(value))
    if number is None or not number.is_finite():
        raise DataError(f"gsm8k finds no number in the row's answer {str(value)[-80:]!r}")
    return number


def completion_answer(text: str, *, last_number: bool) -> Decimal | None:
    """The number that a completion answers; none where it has no readable one."""
    if MARKER in text:
        return parse_number(_after_marker(text))
    if not last_number:
        return None
    numberlike = [run for run in _LAST_NUMBER.findall(text) if any("0" <= char <= "9" for char in run)]
    return parse_number(numberlike[-1].rstrip(".,")) if numberlike else None


def parse_number(text: str) -> Decimal | None:
    """The exact number that ``text`` begins with, when what follows is at most a unit; else none."""
    match = _ANSWER.match(text)
    if match is None:
        return None
    # Decimal, not int: Python refuses to read an integer of more than 4,300 digits, and a policy may write one.
    magnitude = Decimal(match["number"].replace(",", ""))
    return magnitude.copy_negate() if match["sign"] and match["sign"] in _MINUS else magnitude


def _after_marker(text: str) -> str:
    return text.rpartition(MARKER)[2].partition("\n")[0]
