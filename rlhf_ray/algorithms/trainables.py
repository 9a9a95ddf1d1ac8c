"""One Ray Tune ``Trainable`` a configuration class."""

from __future__ import annotations

from typing import ClassVar

from ray.tune.tune import _Config

from rlhf_ray.algorithms.algorithm import Algorithm
from rlhf_ray.algorithms.ppo import PPOConfig
from rlhf_ray.config import AlgorithmConfig

__all__ = ["PPO"]

# Lets Tuner(param_space=config) take a configuration object, as it takes RLlib's.
_Config.register(AlgorithmConfig)


class PPO(Algorithm):
    """Proximal Policy Optimisation with a critic; see :class:`PPOConfig`."""

    config_class: ClassVar[type[AlgorithmConfig]] = PPOConfig
