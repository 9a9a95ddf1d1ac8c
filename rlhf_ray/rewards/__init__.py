"""Rewards: rollout groups in, scored groups out.

``resolve_rewards`` turns settings into functions, ``RewardScorer`` scores one group with them, and ``RewardPool`` does
so on Ray actors with a time limit. The built-in rewards are factories: ``gsm8k(last_number=True)`` is a function.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rlhf_ray.rewards.builtin.environment import environment
from rlhf_ray.rewards.builtin.gsm8k import gsm8k
from rlhf_ray.rewards.builtin.length import length, overlong
from rlhf_ray.rewards.builtin.math_equivalence import math_equivalence
from rlhf_ray.rewards.builtin.patterns import exact_match, format
from rlhf_ray.rewards.functions import NamedReward, resolve_rewards
from rlhf_ray.rewards.reward_model.reward import RewardModelReward

if TYPE_CHECKING:
    from rlhf_ray.rewards.pool import RewardPool
    from rlhf_ray.rewards.scoring import RewardScorer

__all__ = [
    "NamedReward",
    "RewardModelReward",
    "RewardPool",
    "RewardScorer",
    "environment",
    "exact_match",
    "format",
    "gsm8k",
    "length",
    "math_equivalence",
    "overlong",
    "resolve_rewards",
]

# What needs Ray or NumPy is imported when it is first asked for.
_LATER = {"RewardPool": "rlhf_ray.rewards.pool", "RewardScorer": "rlhf_ray.rewards.scoring"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)
