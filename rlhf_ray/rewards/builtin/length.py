"""Built-in reward: every token costs the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rlhf_ray.config.settings import RewardFunction
from rlhf_ray.errors import ConfigError
from rlhf_ray.rewards.registry import built_in

__all__ = ["length", "overlong", "soft_overlong_punishment"]


@built_in
def overlong(*, max_tokens: int, buffer_tokens: int) -> RewardFunction:
    """DAPO's soft overlong punishment, between 0 and -1; see :func:`soft_overlong_punishment`.

    Args:
        max_tokens: Length from which the punishment is -1: ``rollouts.max_new_tokens``, or less.
        buffer_tokens: How many tokens before it the punishment begins.

    Raises:
        ConfigError: Not ``0 < buffer_tokens <= max_tokens``.
    """
    if max_tokens < 1:
        raise ConfigError("overlong.max_tokens", max_tokens, "must be 1 or more")
    if not 0 < buffer_tokens <= max_tokens:
        raise ConfigError("overlong.buffer_tokens", buffer_tokens, f"must lie between 1 and max_tokens ({max_tokens})")

    def reward(*, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        return [
            soft_overlong_punishment(len(ids), max_tokens=max_tokens, buffer_tokens=buffer_tokens)
            for ids in completion_ids
        ]

    return reward


def soft_overlong_punishment(num_tokens: int, *, max_tokens: int, buffer_tokens: int) -> float:
    r"""The punishment of one completion.

    .. math::
        R(y) = 0 \text{ if } |y| \le L - C; \quad
        \frac{(L - C) - |y|}{C} \text{ if } L - C < |y| \le L; \quad
        -1 \text{ if } |y| > L

    with :math:`L` = ``max_tokens`` and :math:`C` = ``buffer_tokens``. "DAPO: An Open-Source LLM Reinforcement
    Learning System at Scale", arXiv:2503.14476, equation 13.

    Args:
        num_tokens: :math:`|y|`, EOS included.
        max_tokens: Tokens.
        buffer_tokens: Tokens.
    """
    excess = num_tokens - (max_tokens - buffer_tokens)
    return -min(max(excess, 0), buffer_tokens) / buffer_tokens


@built_in
def length(*, penalty_per_token: float = 1e-3, free_tokens: int = 0) -> RewardFunction:
    """``-penalty_per_token * max(0, T - free_tokens)`` for a completion of ``T`` tokens, EOS included.

    Args:
        penalty_per_token: Penalty per token; a negative one pays for length.
        free_tokens: Tokens that cost nothing.

    Raises:
        ConfigError: ``penalty_per_token`` is not finite or ``free_tokens`` is negative.
    """
    if not math.isfinite(penalty_per_token):
        raise ConfigError("length.penalty_per_token", penalty_per_token, "must be finite")
    if free_tokens < 0:
        raise ConfigError("length.free_tokens", free_tokens, "must be 0 or more")

    def reward(*, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        return [-penalty_per_token * max(0, len(ids) - free_tokens) for ids in completion_ids]

    return reward
