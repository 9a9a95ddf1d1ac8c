"""What a worker and the driver tell each other of an episode, and what plays one in a worker.

::

    driver                                          worker
    Start ----------------------------------------> Episode.begin() -> Reply: the first request
    tokens are sampled for a request
    Sampled --------------------------------------> Episode.step()  -> Reply: reward, next request, or the end
    ...
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from rlhf_ray.types import ChatMessage, Float32Array, Int32Array, Prompt

__all__ = ["Episode", "EpisodeFailed", "Reply", "Request", "Sampled", "Start"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """An episode that is to begin."""

    prompt: Prompt
    """The row: all its columns, its text, and its tokens."""
    seed: int
    """The environment's, the same for all episodes of a group."""
    environment: str
    """Which of the run's environments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A turn that is asked of the policy.

    Example:
        The first one, ``Request(number=0, sequence=0, token_ids=prompt)``, and after an observation of three tokens
        ``Request(number=1, sequence=0, token_ids=[11, 12, 13], messages=({"role": "tool", "content": "95"},))``
    """

    number: int
    """Counts the requests of an episode; its :class:`Sampled` has the same."""
    sequence: int
    """Which sequence of the trajectory it continues; one more than there are: a new one."""
    token_ids: Int32Array
    """Of a new sequence the whole prompt, else what comes after the tokens that it has: not sampled, only read."""
    messages: tuple[ChatMessage, ...] = ()
    """What these tokens say, for reports: the whole prompt's messages, or the observation's."""
    text: str | None = None
    """What the prompt of a new sequence says that is a text and no chat."""
    max_tokens: int | None = None
    """Longest answer, where the episode asks for less than the run's limits."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer, in addition to the run's."""
    tools: str = ""
    """JSON of the schemas of the tools that the prompt names; empty: those of the run, if any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What the policy answered to a request."""

    number: int
    token_ids: Int32Array
    """``[T]``, all that was sampled, EOS included."""
    logprobs: Float32Array = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    """``[T]``, in nats; for agents that ask for them."""
    finish_reason: str
    """``stop`` or ``length``."""
    message: ChatMessage | None = None
    """As the engine's parsers read it; unset where there is none: the text is all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What comes next in an episode."""

    requests: tuple[Request, ...] = ()
    """Turns to sample; none: the episode waits for other answers, or is over."""
    message: ChatMessage | None = None
    """What was sampled, as a message; unset for a text prompt."""
    reward: float = 0.0
    """For the turn that was given."""
    finish_reason: str | None = None
    """Of an episode that is over: ``stop``, or ``environment`` where a limit of its own ended it."""
    final_reward: float = 0.0
    """For the whole episode, with its end: belongs to the last sampled token."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """As :class:`~rlhf_ray.environments.environment.Step` has them."""
    step_s: float = 0.0
    """Seconds that the environment took."""


class EpisodeFailed(Exception):
    """An episode has no outcome; its group is dropped and counted, never scored 0.

    Args:
        kind: One of ``RewardFailure.kind``.
        message: One line that names the environment and the cause.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)
        self.kind = kind
        self.message = message


class Episode(Protocol):
    """Plays one episode in a worker. Every method may raise :class:`EpisodeFailed`."""

    async def begin(self) -> Reply:
        """Begin; the reply has the first request."""
        ...

    async def step(self, sampled: Sampled) -> Reply:
        """Take what was sampled for one of the requests; the reply is what comes next."""
        ...

    async def cut(self, reason: str) -> Reply:
        """No further turn is sampled (``turns`` or ``length``); the reply may still have a final reward."""
        ...

    async def close(self) -> None:
        """End, at whatever point."""
        ...
