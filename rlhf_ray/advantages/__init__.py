"""Rewards (and the critic's values) become per-token advantages and returns. Pure tensors.

Half precision may be given anywhere and is computed in float32 or better. Results per token are float32, or float64
where an input is; results per completion, and :func:`whiten`'s, have the dtype of the rewards that they replace.
"""

from rlhf_ray.advantages.gae import gae, reinforce_plus_plus, turn_gae
from rlhf_ray.advantages.group_advantages import group_advantages, remax
from rlhf_ray.advantages.kl import AdaptiveKLController, kl
from rlhf_ray.advantages.moments import Moments, explained_variance, whiten
from rlhf_ray.advantages.reward_shaping import kl_penalized_rewards, normalize_rewards, shape_rewards

__all__ = [
    "AdaptiveKLController",
    "Moments",
    "explained_variance",
    "gae",
    "group_advantages",
    "kl",
    "kl_penalized_rewards",
    "normalize_rewards",
    "reinforce_plus_plus",
    "remax",
    "shape_rewards",
    "turn_gae",
    "whiten",
]
