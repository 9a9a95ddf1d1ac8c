"""Reinforcement learning for language models on Ray: vLLM rollouts, reward actors, FSDP2 updates.

::

    from rlhf_ray import PPOConfig

    algo = PPOConfig().build()
    print(algo.train())

Importing the package starts nothing and imports neither Ray nor torch; ``build()`` and the algorithm classes do.

Each algorithm of ``rlhf_ray.algorithms`` has two names here: ``PPOConfig``, its configuration, and ``PPO``, its
:class:`Algorithm`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rlhf_ray.algorithms import built_in as _built_in
from rlhf_ray.config.builder import AlgorithmConfig
from rlhf_ray.config.plugins import register_advantage, register_loss
from rlhf_ray.errors import (
    ConfigError,
    DataError,
    LearnerError,
    RewardError,
    RLHFRayError,
    RolloutError,
    WeightSyncError,
)

if TYPE_CHECKING:
    from rlhf_ray.algorithm.algorithm import Algorithm
    from rlhf_ray.algorithms.cispo import CISPOConfig as CISPOConfig
    from rlhf_ray.algorithms.dapo import DAPOConfig as DAPOConfig
    from rlhf_ray.algorithms.dr_grpo import DrGRPOConfig as DrGRPOConfig
    from rlhf_ray.algorithms.gmpo import GMPOConfig as GMPOConfig
    from rlhf_ray.algorithms.grpo import GRPOConfig as GRPOConfig
    from rlhf_ray.algorithms.gspo import GSPOConfig as GSPOConfig
    from rlhf_ray.algorithms.maxrl import MaxRLConfig as MaxRLConfig
    from rlhf_ray.algorithms.opo import OPOConfig as OPOConfig
    from rlhf_ray.algorithms.ppo import PPOConfig as PPOConfig
    from rlhf_ray.algorithms.reinforce_pp import ReinforcePPBaselineConfig as ReinforcePPBaselineConfig
    from rlhf_ray.algorithms.reinforce_pp import ReinforcePPConfig as ReinforcePPConfig
    from rlhf_ray.algorithms.remax import ReMaxConfig as ReMaxConfig
    from rlhf_ray.algorithms.rloo import RLOOConfig as RLOOConfig
    from rlhf_ray.algorithms.sapo import SAPOConfig as SAPOConfig
    from rlhf_ray.environments.environment import Action, Environment, Step
    from rlhf_ray.rewards.reward_model.reward import RewardModelReward

    CISPO = DAPO = DrGRPO = GMPO = GRPO = GSPO = MaxRL = OPO = PPO = RLOO = ReMax = SAPO = Algorithm
    ReinforcePP = ReinforcePPBaseline = Algorithm
    __version__: str

_CONFIGS = {config_class.__name__: config_class for config_class in _built_in().values()}
_LAZY_MODULES = {
    "Action": "rlhf_ray.environments.environment",
    "Environment": "rlhf_ray.environments.environment",
    "Step": "rlhf_ray.environments.environment",
    "Algorithm": "rlhf_ray.tune.trainables",
    "RewardModelReward": "rlhf_ray.rewards.reward_model.reward",
} | dict.fromkeys(_built_in(), "rlhf_ray.tune.trainables")

__all__ = [
    "Action",
    "Algorithm",
    "AlgorithmConfig",
    "ConfigError",
    "DataError",
    "Environment",
    "LearnerError",
    "RLHFRayError",
    "RewardError",
    "RewardModelReward",
    "RolloutError",
    "Step",
    "WeightSyncError",
    "__version__",
    "register_advantage",
    "register_loss",
]
__all__ += [*_CONFIGS, *_built_in()]
globals().update(_CONFIGS)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("rlhf-ray")
    if name in _LAZY_MODULES:
        return getattr(import_module(_LAZY_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
