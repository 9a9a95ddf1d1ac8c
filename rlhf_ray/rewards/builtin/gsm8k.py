"""Built-in reward: GSM8K's final answer, compared as an exact number."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from rlhf_ray.config.settings import RewardFunction
from rlhf_ray.errors import DataError
from rlhf_ray.rewards.arguments import Completions, column, completion_texts
from rlhf_ray.rewards.builtin.gold import GoldAnswer, gold_answers
from rlhf_ray.rewards.registry import built_in, with_row_check
from rlhf_ray.untrusted_text import shortened

__all__ = ["completion_answer", "gold_number", "gsm8k", "parse_number"]

MARKER = "####"

# Pieces that may repeat are possessive (*+, ?+): none is tried again in another length, so that a completion is read in
# linear time, however many blanks or digits it has.
_DASH = r"\-\u2010-\u2015\u2212"
_CURRENCY = r"\\?[$€£¥₹]"
# What may surround a number without changing it: white space, currency signs, Markdown's emphasis, a LaTeX box.
_OPENING = rf"(?:[\s*_`]|{_CURRENCY}|\\[(\[]|\\boxed\s*+\{{)*+"
_ANSWER = re.compile(
    rf"""
    {_OPENING} (?P<sign>[{_DASH}+]?+) {_OPENING}
    (?P<number> (?> [0-9]{{1,3}}(?:,[0-9]{{3}})++(?:\.[0-9]++)?+ | [0-9]++(?:\.[0-9]++)?+ | \.[0-9]++ ))
    # What follows may be a unit, but must not make the number a part of something else:
    (?! \s*+ (?: [{_DASH}+*/\^=:.,~xX\u00b1\u00b7\u00d7\u00f7\u2215\u2217\u22c5] | \\(?:times|cdot|div) )*+ \s*+ \d )
                                                                      # 1/2, 3 + 4, 2 x 3, 7-8, 1,23, 10:30
    (?! [eE][-+]?[0-9] )                                              # 1e5
    (?! [\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u2079\u2150-\u215e] )  # powers and fractions: 2\u00b3, 3\u00bd
    (?! \s*+ (?:hundred|thousand|million|billion|trillion)\b )        # 5 million
    """,
    re.VERBOSE | re.IGNORECASE,
)
_DIGIT = re.compile("[0-9]")
# A number, single or not, that no word comes before.
_BEGINS_WITH_DIGIT = re.compile(r"(?:\\boxed|[\W_])*+[0-9]")
# A dash after a digit, a letter or a bracket is a subtraction, a range or a hyphen: 10-4 ends in 4.
_LAST_NUMBER = re.compile(rf"(?:(?<![0-9A-Za-z)])[{_DASH}])?(?:{_CURRENCY}[{_DASH}]?)?[0-9.,]+")


@built_in
def gsm8k(*, answer_column: str = "answer", last_number: bool = False) -> RewardFunction:
    """1 where the completion's final number equals the row's, else 0.

    The final number is what follows the last ``####`` on its line, as in the dataset ("Training Verifiers to Solve
    Math Word Problems", arXiv:2110.14168); a ``####`` with no digit after it, a heading or a closing mark, is none.
    Currency signs, thousands separators, units, emphasis and a box do not count, ``50%`` is 50, and values are compared
    exactly: ``3.0`` is 3, ``0.33`` is not 1/3. docs/rewards.md has a table of forms.

    Args:
        answer_column: Dataset column with the answer: the dataset's worked solution, just the number, or a list of
            those, any of which counts.
        last_number: Where no ``####`` is directly followed by a number, take the last number: of the line where words
            come between, of the completion where there is no such line. Off: it scores 0.

    Raises:
        DataError: When called, for a row whose answer holds no number.
    """

    def golds_of(row_value: object) -> list[Decimal]:
        return [gold_number(gold, answer_column) for gold in gold_answers(row_value, answer_column)]

    def reward(*, completions: Completions, **columns: Any) -> list[float]:
        golds = [golds_of(value) for value in column(columns, answer_column)]
        found = [completion_answer(text, last_number=last_number) for text in completion_texts(completions)]
        return [float(answer in accepted) for answer, accepted in zip(found, golds, strict=True)]

    def check_row(row: Mapping[str, Any]) -> None:
        golds_of(column(row, answer_column))

    return with_row_check(reward, check_row)


def gold_number(gold: GoldAnswer, column: str) -> Decimal:
    """The number of a dataset row's answer: a number, a text with ``####``, or a text that is a number.

    Raises:
        DataError: There is no number.
    """
    if isinstance(gold, Decimal):
        return gold
    line = _final_line(gold) if MARKER in gold else gold
    number = None if line is None else parse_number(line)
    if number is None:
        raise DataError(f"the row's {column!r} holds no number that gsm8k can read: {shortened(gold, 80)!r}")
    return number


def completion_answer(text: str, *, last_number: bool) -> Decimal | None:
    """The number that a completion answers; ``None`` where it has no readable one."""
    line = _final_line(text)
    if line is not None and (not last_number or _BEGINS_WITH_DIGIT.match(line)):
        return parse_number(line)
    return _last_number(text if line is None else line) if last_number else None


def parse_number(text: str) -> Decimal | None:
    """The exact number that ``text`` begins with, when what follows is at most a unit; else ``None``."""
    match = _ANSWER.match(text)
    if match is None:
        return None
    # Decimal, not int: Python refuses to read an integer of more than 4,300 digits, and a policy may write one.
    magnitude = Decimal(match["number"].replace(",", ""))
    return magnitude.copy_negate() if match["sign"] not in ("", "+") else magnitude


def _final_line(text: str) -> str | None:
    """What follows the last ``####`` that has a digit after it on its line."""
    for line in reversed(text.split("\n")):
        for piece in reversed(line.split(MARKER)[1:]):
            if _DIGIT.search(piece):
                return piece
    return None


def _last_number(text: str) -> Decimal | None:
    numberlike = [run for run in _LAST_NUMBER.findall(text) if _DIGIT.search(run)]
    return parse_number(numberlike[-1].rstrip(".,")) if numberlike else None
