"""Built-in reward: every token costs the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rlhf_ray.config.settings import RewardFunction
from rlhf_ray.errors import ConfigError
from rlhf_ray.rewards.registry import built_in

__all__ = ["length"]


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
