"""Built-in reward: the whole completion has the asked form."""

from __future__ import annotations

import re
from typing import Any

from rlhf_ray.errors import ConfigError
from rlhf_ray.rewards.arguments import Completions, completion_texts
from rlhf_ray.rewards.registry import built_in
from rlhf_ray.settings import RewardFunction

__all__ = ["format"]

_NO_TAG = r"(?:(?!</?(?:think|answer)>).)*"
THINK_THEN_ANSWER = rf"\s*<think>{_NO_TAG}</think>\s*<answer>{_NO_TAG}</answer>\s*"
"""One thought and one answer in tags, in this order, once, with nothing but white space around them."""


@built_in
def format(*, pattern: str = THINK_THEN_ANSWER) -> RewardFunction:
    """1 where ``pattern`` matches the whole completion, else 0.

    Args:
        pattern: Regular expression for all of the completion, ``.`` matching line ends too.

    Raises:
        ConfigError: ``pattern`` is no regular expression.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError("format.pattern", pattern, f"not a regular expression: {error}") from error

    def reward(*, completions: Completions, **columns: Any) -> list[float]:
        return [float(compiled.fullmatch(text) is not None) for text in completion_texts(completions)]

    return reward
