"""The algorithms: a file for each, with its configuration class.

A class is registered by its ``algorithm_name`` (:class:`~rlhf_ray.config.builder.AlgorithmConfig`); its ``defaults``
name the advantage, the loss and the numbers that make the algorithm. Tables, Trainables, and what ``rlhf_ray`` exports
are made from what the files of this folder register, and nothing else has to be changed to add one.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from rlhf_ray.config.builder import ALGORITHMS, AlgorithmConfig

__all__ = ["built_in"]

for _file in pkgutil.iter_modules(__path__, prefix=f"{__name__}."):
    import_module(_file.name)


def built_in() -> dict[str, type[AlgorithmConfig]]:
    """The algorithms of this folder, by name: not those that users register."""
    return {name: ALGORITHMS[name] for name in sorted(ALGORITHMS) if ALGORITHMS[name].__module__.startswith(__name__)}
