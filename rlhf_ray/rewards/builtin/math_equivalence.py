"""Built-in reward: the completion's mathematical answer equals the row's, decided by the math-verify library."""

from __future__ import annotations

import re
import threading
from typing import Any

from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.rewards.arguments import Completions, column, completion_texts
from rlhf_ray.rewards.registry import built_in
from rlhf_ray.settings import RewardFunction

__all__ = ["math_equivalence"]

_HAS_DELIMITERS = re.compile(r"\$|\\boxed|\\\(|\\\[")


@built_in
def math_equivalence(*, answer_column: str = "answer", timeout_s: int = 2) -> RewardFunction:
    r"""1 where the completion's answer is mathematically the row's, else 0.

    math-verify finds the answer (``\boxed{...}``, LaTeX between ``$``, "the answer is ...", a plain expression) and
    compares with SymPy: ``1/2``, ``0.5`` and ``\frac{2}{4}`` are the same.

    Args:
        answer_column: Dataset column with the answer; LaTeX may stand with or without ``$``.
        timeout_s: Whole seconds that reading, and then comparing, one completion may take. A policy writes things
            like ``$10^{10^{10}}$``, which SymPy never finishes; those score 0. The limit uses a signal, so it holds in
            the main thread only, which is where the reward pool calls functions; elsewhere the group's limit remains.

    Raises:
        ConfigError: ``timeout_s`` is below 1.
        DataError: When called, for a row whose answer math-verify cannot read.
    """
    if timeout_s < 1:
        raise ConfigError("math_equivalence.timeout_s", timeout_s, "must be 1 second or more")
    # Imported here and carried as values: SymPy takes seconds to load, which must not fall into a group's time limit.
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException

    def read(text: str) -> list[Any]:
        limit = timeout_s if threading.current_thread() is threading.main_thread() else None
        try:
            return list(parse(text, fallback_mode="no_fallback", parsing_timeout=limit))
        except TimeoutException:
            return []

    def equal(gold: list[Any], answer: list[Any]) -> bool:
        limit = timeout_s if threading.current_thread() is threading.main_thread() else None
        try:
            return bool(verify(gold, answer, timeout_seconds=limit))
        except TimeoutException:
            return False

    def reward(*, completions: Completions, **columns: Any) -> list[float]:
        golds: dict[str, list[Any]] = {}
        scores = []
        for text, value in zip(completion_texts(completions), column(columns, answer_column), strict=True):
            answer = "" if value is None else str(value)
            if answer not in golds:
                golds[answer] = read(answer if _HAS_DELIMITERS.search(answer) else f"${answer}$")
            if not golds[answer]:
                raise DataError(f"math_equivalence cannot read the row's {answer_column!r}: {answer[-80:]!r}")
            scores.append(float(equal(golds[answer], read(text))))
        return scores

    return reward
