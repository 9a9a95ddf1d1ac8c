"""A sweep with Ray Tune over the arguments of an environment: how many numbers the text game has.

::

    python examples/tune_environment.py
"""

from __future__ import annotations

from typing import Any

from ray import tune
from text_game import Guess

from rlhf_ray import PPO


class Sized(Guess):
    """The text game with fewer numbers."""

    def __init__(self, largest: int) -> None:
        self.largest = largest


def space(iterations: int = 10) -> dict[str, Any]:
    """Return the settings; any argument of an environment may be a sampler."""
    return {
        "environment": {"name": {"name": Sized, "largest": tune.grid_search([3, 7])}, "max_turns": 4},
        "rollouts": {"max_new_tokens": 16},
        "training": {"iterations": iterations},
    }


def main() -> None:
    """Run the trials one after the other, and print their rewards."""
    tuner = tune.Tuner(
        PPO,
        param_space=space(),
        tune_config=tune.TuneConfig(metric="rollouts/reward_mean", mode="max", max_concurrent_trials=1),
    )
    for result in tuner.fit():
        name = result.config["environment"]["name"]
        print(f"largest {name['largest']}: reward {result.metrics['rollouts']['reward_mean']:.3f}")


if __name__ == "__main__":
    main()
