"""One Ray Tune ``Trainable`` per configuration class, under the algorithm's name."""

from __future__ import annotations

import functools

from ray._private.worker import _post_init_hooks
from ray.tune import register_trainable
from ray.tune.tune import _Config

from rlhf_ray.algorithm.algorithm import Algorithm as _Algorithm
from rlhf_ray.algorithms import built_in
from rlhf_ray.config.builder import AlgorithmConfig
from rlhf_ray.tune.trial_algorithm import TrialAlgorithm

__all__ = ["Algorithm", "trainable"]

# What users derive from, so that their own classes may be trials too.
Algorithm = TrialAlgorithm

# Lets Tuner(param_space=config) take a configuration object, as it takes RLlib's.
_Config.register(AlgorithmConfig)


@functools.cache
def trainable(config_class: type[AlgorithmConfig]) -> type[_Algorithm]:
    """The Trainable of a configuration class, a user's own included; Ray Tune knows it by its name too."""
    doc = f"The algorithm of :class:`{config_class.__name__}`; see there."
    contents = {"config_class": config_class, "__doc__": doc, "__module__": __name__}
    made = type(config_class.algorithm_name, (TrialAlgorithm,), contents)
    register = functools.partial(register_trainable, config_class.algorithm_name, made)
    register()
    # Ray keeps the name with its first session, which ends with the first algorithm of a script or a notebook.
    _post_init_hooks.append(register)
    return made


# Attributes of this module, so that they are pickled by name. (Classes can be hashed, though their configs cannot.)
for _name, _config_class in built_in().items():
    globals()[_name] = trainable(_config_class)  # type: ignore[arg-type]
