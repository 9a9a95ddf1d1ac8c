"""Built-in reward: the completion is the row's answer, character by character."""

from __future__ import annotations

import re
from typing import Any

from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.rewards.arguments import Completions, column, completion_texts
from rlhf_ray.rewards.registry import built_in
from rlhf_ray.settings import RewardFunction

__all__ = ["exact_match"]


@built_in
def exact_match(
    *, answer_column: str = "answer", pattern: str | None = None, ignore_case: bool = False
) -> RewardFunction:
    r"""1 where the completion equals the answer, else 0; white space around either does not count.

    Args:
        answer_column: Dataset column with the answer; a number is compared as Python writes it.
        pattern: Regular expression for the part of the completion that is its answer, ``.`` matching line ends too:
            the first group (or the whole) of its last match, as in ``<answer>(.*?)</answer>``. No match scores 0.
            None: the whole completion.
        ignore_case: Compare without regard to case.

    Raises:
        ConfigError: ``pattern`` is no regular expression.
    """
    compiled = _compiled(pattern) if pattern is not None else None

    def normal(text: str) -> str:
        return text.strip().casefold() if ignore_case else text.strip()

    def reward(*, completions: Completions, **columns: Any) -> list[float]:
        answers = [normal(_answer_text(gold, answer_column)) for gold in column(columns, answer_column)]
        found = [_extract(text, compiled) for text in completion_texts(completions)]
        return [float(text is not None and normal(text) == answer) for text, answer in zip(found, answers, strict=True)]

    return reward


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError("exact_match.pattern", pattern, f"not a regular expression: {error}") from error


def _answer_text(gold: object, answer_column: str) -> str:
    if gold is None:
        raise DataError(f"the row's {answer_column!r} is empty: exact_match has nothing to compare with")
    return str(gold)


def _extract(text: str, pattern: re.Pattern[str] | None) -> str | None:
    if pattern is None:
        return text
    matches = list(pattern.finditer(text))
    if not matches:
        return None
    group: str | None = matches[-1][1 if pattern.groups else 0]
    return group
