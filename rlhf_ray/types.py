"""The nouns that cross a stage or a process of the training loop.

Prompt -> RolloutGroup (of Completions) -> ScoredGroup -> what the learner trains on. All are frozen; token
arrays are variable-length numpy arrays, never padded batches.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from rlhf_ray.untrusted_text import shortened

__all__ = [
    "ChatMessage",
    "Completion",
    "Float32Array",
    "Int32Array",
    "Prompt",
    "PromptText",
    "RewardFailure",
    "RolloutGroup",
    "SamplingSettings",
    "ScoredGroup",
    "Span",
    "VersionSpan",
]

Int32Array: TypeAlias = npt.NDArray[np.int32]
Float32Array: TypeAlias = npt.NDArray[np.float32]
ChatMessage: TypeAlias = dict[str, Any]
"""``role`` and ``content``, both strings, and what else the chat template reads, such as ``tool_calls``."""
PromptText: TypeAlias = str | list[ChatMessage]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One dataset row, ready for the engine."""

    prompt_id: int
    """Position in the run's prompt stream: ``epoch * rows + index``; unique in a run."""
    token_ids: Int32Array
    """``[P]``, as the engine reads them."""
    text: PromptText
    """The row's prompt as given to the reward: a string or a chat list. A chat whose last message is the assistant's is
    continued by the completion, which holds only what was sampled."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The row's other columns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """How completions are drawn."""

    group_size: int
    max_new_tokens: int
    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSpan:
    """Tokens ``start <= t < end`` of a completion were sampled from policy ``version``."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled continuation, as the engine wrote it."""

    token_ids: Int32Array
    """``[T]``, EOS or stop token included when one was sampled."""
    sampling_logprobs: Float32Array
    """``[T]``, log-probability of each token under the distribution it was drawn from, in nats."""
    version_spans: tuple[VersionSpan, ...]
    asked_version: int
    """Policy version when the engine was asked: keys and values of the prompt may be that old."""
    finish_reason: str
    """``stop`` (EOS or a stop condition) or ``length`` (truncated)."""

    @property
    def truncated(self) -> bool:
        """Whether the completion was cut by a length limit."""
        return self.finish_reason == "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """The G completions of one prompt."""

    group_id: int
    """Order of submission; equals the prompt's ``prompt_id``."""
    prompt: Prompt
    completions: tuple[Completion, ...]
    replica_id: str
    """Which replica wrote the group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """A rollout group with its rewards."""

    group: RolloutGroup
    rewards: Float32Array
    """``[G]``, the weighted sum over reward functions."""
    rewards_by_function: Mapping[str, Float32Array]
    """Name of a reward function -> ``[G]``, NaN where it answered ``None``."""
    texts: tuple[str, ...]
    """``[G]``, the decoded completions (special tokens left out), for reports."""
    reward_s: float
    """Seconds the reward functions took."""
    logged: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    """Reward function -> metric -> the values that it logged."""
    extras: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """``<function>/<column>`` -> ``[G]``, what reward functions logged of each completion: plain values."""
    greedy_reward: float | None = None
    """Reward of a greedy completion of the prompt, where the advantage asks for one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Something that took time, for the timeline."""

    lane: str
    """Who: ``replica <id>``, ``reward worker <n>``, ``<reward model> <n>``, ``learner <rank>`` or ``algorithm``."""
    name: str
    start: float
    """Unix time in seconds."""
    end: float

    @classmethod
    def ending_now(cls, lane: str, name: str, seconds: float) -> Span:
        """Something that has just ended."""
        now = time.time()
        return cls(lane=lane, name=name, start=now - seconds, end=now)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFailure:
    """A group whose reward could not be computed; it is dropped and replaced, never scored 0."""

    group_id: int
    kind: str
    """``raised``, ``timeout``, ``wrong_length``, ``not_finite``, ``wrong_type``, ``all_none`` or ``worker_died``."""
    message: str
    """One line for the log, cut to about 1,000 characters: it may quote what a policy wrote."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", shortened(self.message, 1000))
