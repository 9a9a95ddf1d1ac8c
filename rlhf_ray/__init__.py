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

from rlhf_ray.algorithms.ppo import PPOConfig
from rlhf_ray.config import AlgorithmConfig
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
    from rlhf_ray.algorithms.algorithm import Algorithm
    from rlhf_ray.algorithms.trainables import PPO

    __version__: str

__all__ = [
    "PPO",
    "Algorithm",
    "AlgorithmConfig",
    "ConfigError",
    "DataError",
    "LearnerError",
    "PPOConfig",
    "RLHFRayError",
    "RewardError",
    "RolloutError",
    "WeightSyncError",
    "__version__",
]

_LAZY_MODULES = {"Algorithm": "rlhf_ray.algorithms.algorithm", "PPO": "rlhf_ray.algorithms.trainables"}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("rlhf-ray")
    if name in _LAZY_MODULES:
        return getattr(import_module(_LAZY_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
