"""A text game as an environment, with PPO and the built-in model (a few minutes on a laptop).

::

    python examples/text_game.py
    python examples/text_game.py training.iterations=5

The policy guesses a number from 1 to 7 and is told whether the number is higher (``+``) or lower (``-``). Half of the
possible numbers are excluded by each hint, so three guesses always suffice. The environment's rewards are the rewards:
1 for the number, decreased by 0.2 for each wrong guess. The observation after a guess is read by the policy, but not
trained on. After ``max_turns`` guesses, the critic's value stands for what would follow.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_ray import Action, Environment, PPOConfig, Step


class Guess(Environment):
    """One game; all games of a group have the same seed, and therefore the same number."""

    largest = 7

    def reset(self, row: Mapping[str, Any], seed: int) -> str:
        """Draw the number, and return the prompt."""
        self.number = random.Random(seed).randint(1, self.largest)
        return f"1-{self.largest}="

    def step(self, action: Action) -> Step:
        """Answer a guess."""
        guess = read(action.text)
        if guess is None:
            return Step(reward=-1.0, done=True)
        if guess == self.number:
            return Step(reward=1.0, done=True, metrics={"found": 1.0})
        return Step(observation="+" if guess < self.number else "-", reward=-0.2)


def read(text: str) -> int | None:
    """Return the guess, or None if it is not a number in range; ``int`` alone would accept ``" 4"`` and ``"४"``."""
    return int(text) if len(text) == 1 and text in "1234567" else None


def config() -> PPOConfig:
    """Build the run; the rows of the built-in task are not used, because ``reset`` returns a prompt."""
    return PPOConfig().environment(Guess, max_turns=4).rollouts(max_new_tokens=16).training(iterations=60)


def main(overrides: Sequence[str]) -> None:
    """Train, and print the mean reward and the number of guesses."""
    algo = config().apply_overrides(overrides).build_algo()
    try:
        while algo.iteration < algo.settings.training.iterations:
            rollouts = algo.train()["rollouts"]
            print(f"reward {rollouts['reward_mean']:.3f}   guesses {rollouts['turns_mean']:.2f}", flush=True)
        print(f"run directory: {algo.run_dir}")
    finally:
        algo.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
