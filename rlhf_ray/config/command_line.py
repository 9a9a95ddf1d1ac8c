"""A configuration as a command line gives it: a file, and overrides of what the file says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf_ray.config.builder import AlgorithmConfig
from rlhf_ray.config.yaml_text import parsed_override

__all__ = ["is_algorithm", "load_config"]


def load_config(path: str | Path | None, overrides: Sequence[str]) -> AlgorithmConfig:
    """Read a configuration.

    Args:
        path: YAML file; ``None``: the defaults, which are the quickstart task.
        overrides: ``section.field=value``, applied in order, and ``algorithm=NAME`` in place of the file's.

    Raises:
        ConfigError: There is no such file, or a setting in it or in ``overrides`` is wrong.
    """
    named = [parsed_override(override)[1] for override in overrides if is_algorithm(override)]
    config = AlgorithmConfig.from_yaml("{}\n" if path is None else Path(path), algorithm=named[-1] if named else None)
    return config.apply_overrides(overrides)


def is_algorithm(override: str) -> bool:
    """Whether an override names the algorithm rather than a setting."""
    return override.startswith("algorithm=")
