"""Reinforcement learning for language models on Ray: vLLM rollouts, reward actors, FSDP2 updates.

::

    from rlhf_ray import PPOConfig

    algo = PPOConfig().build()
    print(algo.train())

Importing the package starts nothing and imports neither Ray nor torch; ``build()`` and the algorithm classes do.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rlhf_ray.algorithms.cispo import CISPOConfig
from rlhf_ray.algorithms.dapo import DAPOConfig
from rlhf_ray.algorithms.dr_grpo import DrGRPOConfig
from rlhf_ray.algorithms.gmpo import GMPOConfig
from rlhf_ray.algorithms.grpo import GRPOConfig
from rlhf_ray.algorithms.gspo import GSPOConfig
from rlhf_ray.algorithms.maxrl import MaxRLConfig
from rlhf_ray.algorithms.opo import OPOConfig
from rlhf_ray.algorithms.ppo import PPOConfig
from rlhf_ray.algorithms.reinforce_pp import ReinforcePPBaselineConfig, ReinforcePPConfig
from rlhf_ray.algorithms.remax import ReMaxConfig
from rlhf_ray.algorithms.rloo import RLOOConfig
from rlhf_ray.algorithms.sapo import SAPOConfig
from rlhf_ray.config.builder import BUILT_IN_ALGORITHMS as _BUILT_IN_ALGORITHMS
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
    from rlhf_ray.rewards.reward_model.reward import RewardModelReward
    from rlhf_ray.tune.trainables import (
        CISPO,
        DAPO,
        GMPO,
        GRPO,
        GSPO,
        OPO,
        PPO,
        RLOO,
        SAPO,
        DrGRPO,
        MaxRL,
        ReinforcePP,
        ReinforcePPBaseline,
        ReMax,
    )

    __version__: str

__all__ = [
    "CISPO",
    "DAPO",
    "GMPO",
    "GRPO",
    "GSPO",
    "OPO",
    "PPO",
    "RLOO",
    "SAPO",
    "Algorithm",
    "AlgorithmConfig",
    "CISPOConfig",
    "ConfigError",
    "DAPOConfig",
    "DataError",
    "DrGRPO",
    "DrGRPOConfig",
    "GMPOConfig",
    "GRPOConfig",
    "GSPOConfig",
    "LearnerError",
    "MaxRL",
    "MaxRLConfig",
    "OPOConfig",
    "PPOConfig",
    "RLHFRayError",
    "RLOOConfig",
    "ReMax",
    "ReMaxConfig",
    "ReinforcePP",
    "ReinforcePPBaseline",
    "ReinforcePPBaselineConfig",
    "ReinforcePPConfig",
    "RewardError",
    "RewardModelReward",
    "RolloutError",
    "SAPOConfig",
    "WeightSyncError",
    "__version__",
    "register_advantage",
    "register_loss",
]

_LAZY_MODULES = {
    "Algorithm": "rlhf_ray.algorithm.algorithm",
    "RewardModelReward": "rlhf_ray.rewards.reward_model.reward",
} | dict.fromkeys(_BUILT_IN_ALGORITHMS, "rlhf_ray.tune.trainables")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("rlhf-ray")
    if name in _LAZY_MODULES:
        return getattr(import_module(_LAZY_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
