"""Stage 4 of the loop: rewards (and the critic's values) become per-token advantages and returns. Pure tensors."""

from rlhf_ray.advantages.explained_variance import explained_variance
from rlhf_ray.advantages.gae import gae
from rlhf_ray.advantages.kl import kl
from rlhf_ray.advantages.moments import Moments
from rlhf_ray.advantages.token_rewards import kl_penalised_rewards
from rlhf_ray.advantages.whitening import whiten

__all__ = ["Moments", "explained_variance", "gae", "kl", "kl_penalised_rewards", "whiten"]
