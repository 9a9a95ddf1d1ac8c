"""Built-in reward: a completion that comes near the length limit loses reward before it is cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf_ray.config.settings import RewardFunction
from rlhf_ray.errors import ConfigError
from rlhf_ray.rewards.registry import built_in

__all__ = ["overlong", "soft_overlong_punishment"]


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
