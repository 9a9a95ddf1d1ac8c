"""A regular expression of the user's with a time limit: it may take forever on what a policy writes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal
from typing import Any

import regex

from rlhf_ray.config.settings import RewardFunction
from rlhf_ray.errors import ConfigError
from rlhf_ray.rewards.arguments import Completions, column, completion_texts
from rlhf_ray.rewards.builtin.gold import GoldAnswer, gold_answers
from rlhf_ray.rewards.registry import built_in, with_row_check

__all__ = ["UserPattern", "exact_match", "format"]

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


_NO_TAG = r"(?:(?!</?(?:think|answer)>).)*"

THINK_THEN_ANSWER = rf"\s*<think>{_NO_TAG}</think>\s*<answer>{_NO_TAG}</answer>\s*"

"""One thought and one answer in tags, in this order, once, with nothing but white space around them."""


@built_in
def format(*, pattern: str = THINK_THEN_ANSWER, timeout_s: float = 1.0) -> RewardFunction:
    """1 where ``pattern`` matches the whole completion, else 0.

    Args:
        pattern: Regular expression for all of the completion, ``.`` matching line ends too.
        timeout_s: Longest match of one completion, in seconds.

    Raises:
        ConfigError: ``pattern`` is no regular expression, or ``timeout_s`` is not above 0.
        TimeoutError: When called, for a completion that is not matched in time.
    """
    form = UserPattern(pattern, timeout_s, field="format")

    def reward(*, completions: Completions, **columns: Any) -> list[float]:
        return [float(form.matches(text)) for text in completion_texts(completions)]

    return reward


class UserPattern:
    """A regular expression with a time limit, ``.`` matching line ends too.

    Python's own ``re`` cannot be interrupted outside the main thread; ``regex`` reads the same patterns and can.

    Args:
        pattern: The regular expression.
        timeout_s: Longest search of one text, in seconds.
        field: The reward that it is an argument of, for messages.

    Raises:
        ConfigError: It is no regular expression, or the limit is not above 0.
    """

    def __init__(self, pattern: str, timeout_s: float, *, field: str) -> None:
        if not (timeout_s > 0 and math.isfinite(timeout_s)):
            raise ConfigError(f"{field}.timeout_s", timeout_s, "must be finite and above 0")
        try:
            self._pattern = regex.compile(pattern, regex.DOTALL | regex.VERSION0)
        except regex.error as error:
            raise ConfigError(f"{field}.pattern", pattern, f"not a regular expression: {error}") from error
        self._timeout_s = timeout_s
        self._field = field

    def matches(self, text: str) -> bool:
        """Whether the whole of ``text`` matches.

        Raises:
            TimeoutError: That is not known in time.
        """
        with self._explained(text):
            return self._pattern.fullmatch(text, timeout=self._timeout_s) is not None

    def last(self, text: str) -> str | None:
        """The first group, or else the whole, of the last match in ``text``; ``None`` without one.

        Raises:
            TimeoutError: That is not known in time.
        """
        found: str | None = None
        with self._explained(text):
            for match in self._pattern.finditer(text, timeout=self._timeout_s):
                found = match[1 if self._pattern.groups else 0]
        return found

    @contextmanager
    def _explained(self, text: str) -> Iterator[None]:
        try:
            yield
        except TimeoutError as error:
            message = f"{self._field}.pattern takes more than {self._timeout_s:g} s ({self._field}.timeout_s)"
            raise TimeoutError(f"{message} on a completion of {len(text)} characters") from error
