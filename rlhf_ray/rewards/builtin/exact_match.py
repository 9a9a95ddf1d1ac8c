"""Built-in reward: the completion is the row's answer, character by character."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from rlhf_ray.config.settings import RewardFunction
from rlhf_ray.rewards.arguments import Completions, column, completion_texts
from rlhf_ray.rewards.builtin.gold import GoldAnswer, gold_answers
from rlhf_ray.rewards.builtin.user_pattern import UserPattern
from rlhf_ray.rewards.registry import built_in, with_row_check

__all__ = ["exact_match"]

_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")


@built_in
def exact_match(
    *, answer_column: str = "answer", pattern: str | None = None, ignore_case: bool = False, timeout_s: float = 1.0
) -> RewardFunction:
    r"""1 where the completion equals the answer, else 0; white space around either does not count.

    Args:
        answer_column: Dataset column with the answer: a text; a number, which any plain spelling of its value equals
            (12.0 and ``12``); or a list of them, any of which counts.
        pattern: Regular expression for the part of the completion that is its answer, ``.`` matching line ends too:
            the first group (or the whole) of its last match, as in ``<answer>([^<]*)</answer>``. No match scores 0.
            Unset: the whole completion.
        ignore_case: Compare without regard to case.
        timeout_s: Longest search for ``pattern`` in one completion, in seconds.

    Raises:
        ConfigError: ``pattern`` is no regular expression, or ``timeout_s`` is not above 0.
        DataError: When called, for a row whose answer is of no such form.
        TimeoutError: When called, for a completion in which ``pattern`` is not found in time.
    """
    search = UserPattern(pattern, timeout_s, field="exact_match") if pattern is not None else None

    def equal(text: str, gold: GoldAnswer) -> bool:
        text = text.strip()
        if isinstance(gold, Decimal):
            return _NUMBER.fullmatch(text) is not None and Decimal(text) == gold
        return text.casefold() == gold.casefold() if ignore_case else text == gold

    def reward(*, completions: Completions, **columns: Any) -> list[float]:
        golds = [gold_answers(value, answer_column) for value in column(columns, answer_column)]
        found = [text if search is None else search.last(text) for text in completion_texts(completions)]
        return [
            float(text is not None and any(equal(text, gold) for gold in accepted))
            for text, accepted in zip(found, golds, strict=True)
        ]

    def check_row(row: Mapping[str, Any]) -> None:
        gold_answers(column(row, answer_column), answer_column)

    return with_row_check(reward, check_row)
