"""What the environment gave, as a reward among others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_ray.config.settings import RewardFunction
from rlhf_ray.rewards.registry import built_in

__all__ = ["environment", "is_environment"]


@built_in
def environment() -> RewardFunction:
    """The rewards of all turns, added up: of the environment, or what an agent returned.

    Its weight goes to the turns themselves; the reward of the whole is the same.
    """
    return _EnvironmentReward()


def is_environment(function: object) -> bool:
    """Whether a reward function is this one."""
    return isinstance(function, _EnvironmentReward)


class _EnvironmentReward:
    __name__ = "environment"

    def __call__(self, *, turns: Sequence[Sequence[Mapping[str, Any]]]) -> list[float]:
        """Add up."""
        return [float(sum(turn["reward"] for turn in trajectory)) for trajectory in turns]
