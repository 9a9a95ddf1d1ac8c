"""What a user writes: an environment that answers what the policy sampled, turn by turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

from rlhf_ray.types import ChatMessage

__all__ = ["Action", "Environment", "Observation", "Step"]

Observation: TypeAlias = str | Sequence[ChatMessage]
"""A text (to a chat: one message of the user), or messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """What the policy sampled in a turn.

    Example:
        ``Action(text="4", message={"role": "assistant", "content": "4"}, token_ids=(19, 2), truncated=False)``
    """

    text: str
    """Decoded, special tokens left out."""
    message: ChatMessage
    """The same as a message: ``role``, ``content``, and ``reasoning`` and ``tool_calls`` where parsers found some."""
    token_ids: tuple[int, ...]
    truncated: bool
    """Whether a length limit cut it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What an environment answers.

    Example:
        ``Step(observation="higher", reward=-0.1)``, and at the end ``Step(reward=1.0, done=True)``
    """

    observation: Observation | None = None
    """What the policy reads next; unset: nothing, and it continues by itself. Not read where the episode is over."""
    reward: float = 0.0
    """For this turn."""
    done: bool = False
    """Whether the episode is over: nothing of value follows."""
    truncated: bool = False
    """Whether a limit of the environment's own ended the episode: the critic's value stands for what would follow."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Numbers to report as ``environment/<name>/<metric>``, means over steps."""


class Environment:
    """An episode's world. Derive from it, or write a class with the same ``reset`` and ``step``, sync or async.

    One object plays one episode at a time, in a worker process that plays many. What it draws must follow from ``seed``
    and from the actions: a worker that dies is replaced, and its other episodes are played again from what was sampled.

    Example:
        A game of guessing a number::

            class Guess(Environment):
                def reset(self, row, seed):
                    self.number = random.Random(seed).randint(1, 7)
                    return "Guess a number from 1 to 7:"

                def step(self, action):
                    if action.text.strip() == str(self.number):
                        return Step(reward=1.0, done=True)
                    return Step(observation="No. Guess again:")
    """

    deterministic: ClassVar[bool] = True
    """Whether the same seed and actions give the same observations; if not, episodes of dead workers are dropped."""

    def reset(self, row: Mapping[str, Any], seed: int) -> Observation | None:
        """Begin an episode.

        Args:
            row: The dataset row, with its prompt.
            seed: The same for all episodes of a group, which must begin alike.

        Returns:
            The prompt, in place of the row's; ``None``: the row's own.
        """
        raise NotImplementedError

    def step(self, action: Action) -> Step:
        """Answer what the policy sampled."""
        raise NotImplementedError

    def close(self) -> None:
        """Free what the object holds, at the end of an episode, however it ended."""
