"""Environments for tests, of which some misbehave when the policy writes a word."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping
from typing import Any

from rlhf_ray.environments.environment import Action, Environment, Step

__all__ = ["Echo", "Guess", "Once", "Sums", "Unseeded"]


class Guess(Environment):
    """A number from 1 to ``size`` is guessed from hints."""

    def __init__(self, size: int = 7) -> None:
        self._size = size

    def reset(self, row: Mapping[str, Any], seed: int) -> str:
        """Draw the number."""
        self.number = random.Random(seed).randint(1, self._size)
        return f"{row['prompt']} 1-{self._size}:"

    def step(self, action: Action) -> Step:
        """Compare."""
        text = action.text.strip()
        if not (text.isascii() and text.isdigit()):
            return Step(done=True, reward=-1.0)
        if int(text) == self.number:
            return Step(reward=1.0, done=True, metrics={"distance": 0.0})
        distance = abs(int(text) - self.number)
        return Step(observation="no ", reward=-0.1, metrics={"distance": float(distance)})


class Once(Environment):
    """A single turn, scored by nothing."""

    def reset(self, row: Mapping[str, Any], seed: int) -> None:
        """Keep the row's prompt."""

    def step(self, action: Action) -> Step:
        """End."""
        return Step(done=not action.truncated, truncated=action.truncated)


class Echo(Environment):
    """Repeats what the policy writes, and does what it says: die, hang, raise, or stop."""

    def __init__(self, hang_s: float = 3600.0) -> None:
        self._hang_s = hang_s
        self._turn = 0

    def reset(self, row: Mapping[str, Any], seed: int) -> None:
        """Keep the row's prompt."""
        if row.get("reset") == "raise":
            raise ValueError("no such level")

    def step(self, action: Action) -> Step:
        """Obey."""
        self._turn += 1
        text = action.text
        if "die" in text:
            os._exit(1)
        if "hang" in text:
            time.sleep(self._hang_s)
        if "raise" in text:
            raise KeyError(text)
        if "exit" in text:
            raise SystemExit(3)
        return Step(observation=f"<{text}{self._turn}>", reward=float(self._turn), done="stop" in text)


class Sums(Environment):
    """Several sums in a row, each written behind the answer to the one before."""

    def __init__(self, turns: int = 3) -> None:
        self._left = turns

    def reset(self, row: Mapping[str, Any], seed: int) -> None:
        """Keep the row's sum as the first one."""
        self._random = random.Random(seed)
        self._answer = str(row["answer"])

    def step(self, action: Action) -> Step:
        """Grade, and ask for the next one."""
        self._left -= 1
        right = action.text == self._answer
        first, second = self._random.randint(10, 99), self._random.randint(10, 99)
        self._answer = str(first + second)
        return Step(
            observation=f" {first}+{second}=",
            reward=float(right),
            done=self._left == 0,
            metrics={"right": float(right)},
        )


class Unseeded(Environment):
    """What it says follows from nothing."""

    def reset(self, row: Mapping[str, Any], seed: int) -> None:
        """Keep the row's prompt."""

    def step(self, action: Action) -> Step:
        """Draw."""
        return Step(observation=str(random.SystemRandom().random()))
