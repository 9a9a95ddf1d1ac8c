"""The nouns that cross a stage or a process of the training loop.

Prompt -> RolloutGroup (of Trajectories) -> ScoredGroup -> SequenceBatch. All are frozen; token
arrays are variable-length numpy arrays, never padded batches.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from rlhf_ray.untrusted_text import shortened

__all__ = [
    "BoolArray",
    "ChatMessage",
    "Device",
    "EnvironmentStats",
    "Float32Array",
    "FurtherSequence",
    "Int32Array",
    "LoadReport",
    "Prompt",
    "PromptPosition",
    "PromptText",
    "RewardFailure",
    "RolloutGroup",
    "SamplingSettings",
    "ScoredGroup",
    "TokenEstimates",
    "TraceSpan",
    "Trajectory",
    "Turn",
    "VersionSpan",
]

Int32Array: TypeAlias = npt.NDArray[np.int32]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
Float32Array: TypeAlias = npt.NDArray[np.float32]
ChatMessage: TypeAlias = dict[str, Any]
"""``role`` and ``content``, both strings, and what else the chat template reads, such as ``tool_calls``."""
PromptText: TypeAlias = str | list[ChatMessage]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One dataset row, ready for the engine.

    Example:
        Row 3 of the quickstart task in its second epoch of 512 rows, with one token per character::

            Prompt(prompt_id=515, token_ids=[4 7 + 8 5 =], text="47+85=", columns={"answer": "132"})
    """

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
class PromptPosition:
    """The position of a prompt stream: the next row to hand out.

    Example:
        Row 3 of the second epoch is next, and two prompts of the first were not trained on:
        ``PromptPosition(epoch=1, row=3, unfinished=(508, 511))``
    """

    epoch: int = 0
    row: int = 0
    """Index in the epoch's order; counts every row, those that were dropped too."""
    unfinished: tuple[int, ...] = ()
    """Ids of earlier prompts that come first, ascending: they were handed out, but not trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """On what a run computes.

    Example:
        ``Device(on_gpu=True, learners_on_gpu=True, colocated=False, dtype="bfloat16", reason="Ray offers 4 GPUs")``
    """

    on_gpu: bool
    """Whether replicas run on GPUs."""
    learners_on_gpu: bool
    colocated: bool
    """Whether each replica shares its GPU with a learner, and takes turns with it."""
    dtype: str
    """``float32`` or ``bfloat16``, of engines and of the learners' forward passes."""
    reason: str = ""
    """Why replicas run on GPUs or CPUs."""

    def __str__(self) -> str:
        return f"{'GPUs' if self.on_gpu else 'CPUs'}: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """How completions are drawn.

    Example:
        ``SamplingSettings(group_size=8, max_new_tokens=1024, temperature=1.0)`` in training, and
        ``SamplingSettings(group_size=1, max_new_tokens=1024, temperature=0.0)`` for a greedy evaluation.
    """

    group_size: int
    max_new_tokens: int
    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    parse: bool = False
    """Whether the engine reads each completion as a chat message, with its parsers of tool calls and reasoning."""
    tools: str = ""
    """JSON of the schemas of the tools that the prompt names, for these parsers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSpan:
    """Tokens ``start <= t < end`` of a trajectory were sampled from policy ``version``.

    Example:
        New weights came after 40 of 100 tokens: ``VersionSpan(version=4, start=0, end=40)`` and
        ``VersionSpan(version=5, start=40, end=100)``.
    """

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What the policy sampled without interruption, and the reward that its environment gave for it."""

    start: int
    """First sampled token, counted from the end of the prompt."""
    end: int
    """One past the last sampled token; what follows up to the next turn was observed."""
    reward: float = 0.0
    message: ChatMessage | None = None
    """What was sampled, as the engine's parsers read it: ``content``, ``reasoning``, ``tool_calls``; unset: no chat."""
    observation: tuple[ChatMessage, ...] = ()
    """Messages that the environment answered with, of the observed tokens that follow; of a text, one of a user."""
    number: int | None = None
    """When it was asked, among all turns of the trajectory: the larger the later. Unset: in the order of sequences."""
    follower: int | None = None
    """Number of the turn that comes after it, in a trajectory with turns in parallel; its own: none does. Unset: the
    next larger number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """All tokens after a prompt: sampled by the policy, in one turn or several, and observed between turns.

    Example:
        A calculator answers ``95;`` to ``37+58``, after which the policy samples ``95``; with one token per character::

            token_ids     3 7 + 5 8 9 5 ; 9 5
            turns         Turn(start=0, end=5), Turn(start=8, end=10, reward=1.0)
            loss_mask     1 1 1 1 1 0 0 0 1 1
    """

    token_ids: Int32Array
    """``[T]``, EOS or stop tokens included where they were sampled."""
    sampling_logprobs: Float32Array
    """``[T]``, log-probability of each sampled token under the distribution it was drawn from, in nats; 0 at others."""
    turns: tuple[Turn, ...]
    version_spans: tuple[VersionSpan, ...]
    """Of the sampled tokens, in order."""
    asked_version: int
    """Policy version when the engine was asked: keys and values of the prompt may be that old."""
    finish_reason: str
    """``stop`` (EOS, a stop condition, or the environment is done), or why it was truncated: ``length`` (of tokens),
    ``turns`` (``environment.max_turns``) or ``environment`` (a limit of its own)."""
    further: tuple[FurtherSequence, ...] = ()
    """What was sampled after its history had been written anew, in order; rewards and baselines count it once."""

    @classmethod
    def single_turn(cls, *, token_ids: Int32Array, **fields: Any) -> Trajectory:
        """A completion: every token was sampled, without interruption."""
        return cls(token_ids=token_ids, turns=(Turn(start=0, end=len(token_ids)),), **fields)

    @property
    def loss_mask(self) -> BoolArray:
        """``[T]``, true at tokens that the policy sampled."""
        mask = np.zeros(len(self.token_ids), dtype=np.bool_)
        for turn in self.turns:
            mask[turn.start : turn.end] = True
        return mask

    @property
    def truncated(self) -> bool:
        """Whether a limit ended it, not the policy or its environment."""
        return self.finish_reason in _LIMITS

    @property
    def sequences(self) -> tuple[Trajectory, ...]:
        """All its sequences: itself, and the further ones."""
        return (self, *(one.trajectory for one in self.further))

    @property
    def all_turns(self) -> tuple[Turn, ...]:
        """The turns of all its sequences, in order."""
        return tuple(turn for sequence in self.sequences for turn in sequence.turns)

    @property
    def num_sampled(self) -> int:
        """How many tokens the policy sampled, in all its sequences."""
        return sum(turn.end - turn.start for turn in self.all_turns)

    @property
    def environment_reward(self) -> float:
        """The sum of the rewards of all turns."""
        return sum(turn.reward for turn in self.all_turns)


_LIMITS = frozenset({"length", "turns", "environment"})


@dataclass(frozen=True, slots=True, kw_only=True)
class FurtherSequence:
    """A sequence of a trajectory with a prompt of its own: history that was shortened, summarized, or forked.

    Example:
        After 40 turns an agent replaces its history by a summary: ``FurtherSequence(prompt_token_ids=summary,
        trajectory=rest)``
    """

    prompt_token_ids: Int32Array
    """``[P]``"""
    trajectory: Trajectory
    """What comes after that prompt; it has no further sequences itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """The G trajectories of one prompt.

    Example:
        ``RolloutGroup(group_id=515, prompt=prompt, trajectories=(first, second), replica_id="k3v9")``
    """

    group_id: int
    """Order of submission; equals the prompt's ``prompt_id``."""
    prompt: Prompt
    trajectories: tuple[Trajectory, ...]
    replica_id: str
    """Which replica wrote the group, or its first turns."""
    environment: str = ""
    """Name of the environment; empty: none, a single turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """A rollout group with its rewards.

    Example:
        Of two completions of ``47+85=`` the first is right; ``format`` weighs 0.5 and does not apply to the second::

            ScoredGroup(
                group=group,
                rewards=[1.5, 0.0],
                rewards_by_function={"correct": [1.0, 0.0], "format": [1.0, nan]},
                texts=("132", "13x"),
                reward_s=0.01,
            )
    """

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
    environment_weight: float = 0.0
    """Weight of the turns' rewards in ``rewards``: so much of each belongs to its turn, the rest to the last one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """A replica's answer to a publication.

    Example:
        ``LoadReport(replica_id="k3v9", version=5, pause_s=0.02)``
    """

    replica_id: str
    version: int
    pause_s: float
    """Seconds during which generation was paused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEstimates:
    """What learners computed of the tokens of one sequence, for reports; NaN at tokens that do not enter the losses.

    Example:
        Of ``1 2 9 3``, of which ``9`` is observed, with a reward of 1 at the end, and ``lambda_`` and ``gamma`` 1::

            TokenEstimates(advantages=[0.6 0.5 nan 0.2], values=[0.4 0.5 nan 0.8])
    """

    advantages: Float32Array
    """``[T]``, as they entered the policy loss: whitened where ``training.whiten_advantages`` says so."""
    values: Float32Array | None = None
    """``[T]``, the critic's before the update, of what was before each token, in reward; ``None`` without a critic."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSpan:
    """Something that took time, for the timeline.

    Example:
        ``TraceSpan(lane="learner 0", name="update", start=1764543600.0, end=1764543602.5)``
    """

    lane: str
    """Who: ``replica <id>``, ``environment worker <n>``, ``reward worker <n>``, ``<reward model> <n>``,
    ``learner <rank>`` or ``algorithm``."""
    name: str
    start: float
    """Unix time in seconds."""
    end: float

    @classmethod
    def ending_now(cls, lane: str, name: str, seconds: float) -> TraceSpan:
        """Something that has just ended."""
        now = time.time()
        return cls(lane=lane, name=name, start=now - seconds, end=now)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFailure:
    """A group whose reward could not be computed; it is dropped and replaced, never scored 0.

    Example:
        ``RewardFailure(group_id=515, kind="timeout", message="correct took longer than rewards.timeout_s = 30 s")``
    """

    group_id: int
    kind: str
    """``raised``, ``timeout``, ``wrong_length``, ``not_finite``, ``wrong_type``, ``all_none`` or ``worker_died``; of an
    environment also ``not_seeded``, ``too_long`` and ``limit``."""
    message: str
    """One line for the log, cut to about 1,000 characters: it may quote what a policy wrote."""
    environment: str = ""
    """The environment that failed; empty: a reward function."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", shortened(self.message, 1000))


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentStats:
    """What the episodes of an environment came to; two of them add up.

    Example:
        Of 40 steps in 2 seconds 10 reported a distance, 31.5 in all, and one group was dropped::

            EnvironmentStats(steps=40, steps_s=2.0, metrics={"distance": (31.5, 10)}, failures={"timeout": 1})
    """

    steps: int = 0
    steps_s: float = 0.0
    """Seconds that the environment took for these steps."""
    metrics: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    """Metric -> the sum of what steps reported, and how many of them did."""
    failures: Mapping[str, int] = field(default_factory=dict)
    """Kind of a failure (``RewardFailure.kind``) -> groups that were dropped because of it."""

    @classmethod
    def of_step(cls, step_s: float, metrics: Mapping[str, float]) -> EnvironmentStats:
        """One step, with what it reported."""
        return cls(steps=1, steps_s=step_s, metrics={name: (value, 1) for name, value in metrics.items()})

    def __add__(self, other: EnvironmentStats) -> EnvironmentStats:
        metrics = dict(self.metrics)
        for name, (total, count) in other.metrics.items():
            before, counted = metrics.get(name, (0.0, 0))
            metrics[name] = (before + total, counted + count)
        return EnvironmentStats(
            steps=self.steps + other.steps,
            steps_s=self.steps_s + other.steps_s,
            metrics=metrics,
            failures=Counter(self.failures) + Counter(other.failures),
        )
