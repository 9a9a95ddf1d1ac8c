"""One Ray Tune ``Trainable`` a configuration class, under the algorithm's name."""

from __future__ import annotations

import functools

from ray._private.worker import _post_init_hooks
from ray.tune import register_trainable
from ray.tune.tune import _Config

from rlhf_ray.algorithm.algorithm import Algorithm
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
from rlhf_ray.config.builder import AlgorithmConfig
from rlhf_ray.tune.trial_algorithm import TrialAlgorithm

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
    "DrGRPO",
    "MaxRL",
    "ReMax",
    "ReinforcePP",
    "ReinforcePPBaseline",
    "trainable",
]

# Lets Tuner(param_space=config) take a configuration object, as it takes RLlib's.
_Config.register(AlgorithmConfig)


@functools.cache
def trainable(config_class: type[AlgorithmConfig]) -> type[Algorithm]:
    """The Trainable of a configuration class, a user's own included; Ray Tune knows it by its name too."""
    doc = f"The algorithm of :class:`{config_class.__name__}`; see there."
    contents = {"config_class": config_class, "__doc__": doc, "__module__": __name__}
    made = type(config_class.algorithm_name, (TrialAlgorithm,), contents)
    register = functools.partial(register_trainable, config_class.algorithm_name, made)
    register()
    # Ray keeps the name with its first session, which ends with the first algorithm of a script or a notebook.
    _post_init_hooks.append(register)
    return made


CISPO = trainable(CISPOConfig)
DAPO = trainable(DAPOConfig)
DrGRPO = trainable(DrGRPOConfig)
GMPO = trainable(GMPOConfig)
GRPO = trainable(GRPOConfig)
GSPO = trainable(GSPOConfig)
MaxRL = trainable(MaxRLConfig)
OPO = trainable(OPOConfig)
PPO = trainable(PPOConfig)
RLOO = trainable(RLOOConfig)
ReMax = trainable(ReMaxConfig)
ReinforcePP = trainable(ReinforcePPConfig)
ReinforcePPBaseline = trainable(ReinforcePPBaselineConfig)
SAPO = trainable(SAPOConfig)
