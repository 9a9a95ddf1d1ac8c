"""Built-in reward: the whole completion has the asked form."""

from __future__ import annotations

from typing import Any

from rlhf_ray.config.settings import RewardFunction
from rlhf_ray.rewards.arguments import Completions, completion_texts
from rlhf_ray.rewards.builtin.user_pattern import UserPattern
from rlhf_ray.rewards.registry import built_in

__all__ = ["format"]

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
