"""The arguments of reward functions: what they ask for, what they are given, and what they may report with it."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from rlhf_ray.config.settings import REWARD_ARGUMENTS
from rlhf_ray.config.user_code import bound_arguments
from rlhf_ray.errors import DataError

if TYPE_CHECKING:
    from rlhf_ray.types import ChatMessage, Trajectory

__all__ = [
    "CallLog",
    "Completions",
    "Parameters",
    "TrainerState",
    "TrainingProgress",
    "column",
    "completion_texts",
    "messages_of",
    "own_copies",
    "unbound",
]

Completions: TypeAlias = Sequence[str | list[dict[str, str]]]
"""``[G]``: texts, or chats of role and content."""

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_IMMUTABLE = frozenset({str, int, float, bool, bytes, type(None)})


def completion_texts(completions: Completions) -> list[str]:
    """``[G]`` texts: a plain completion as it is, the content of a chat completion's last message of the assistant."""
    return [item if isinstance(item, str) else _last_of_assistant(item) for item in completions]


def _last_of_assistant(messages: Sequence[Mapping[str, Any]]) -> str:
    contents = [message["content"] for message in messages if message["role"] == "assistant"]
    return str(contents[-1] if contents else messages[-1]["content"])


def messages_of(trajectory: Trajectory) -> list[ChatMessage] | None:
    """All messages after the prompt of a chat, sampled and observed; ``None`` where they are not known as messages."""
    messages: list[ChatMessage] = []
    for turn in (turn for sequence in trajectory.sequences for turn in sequence.turns):
        if turn.message is None:
            return None
        messages += [turn.message, *turn.observation]
    return messages


def column(columns: Mapping[str, Sequence[Any]], name: str) -> Sequence[Any]:
    """The dataset column ``name``, ``[G]``.

    Raises:
        DataError: The dataset has no such column.
    """
    if name not in columns:
        present = ", ".join(sorted(columns.keys() - REWARD_ARGUMENTS)) or "none"
        raise DataError(f"the reward reads the dataset column {name!r}, which is not there (columns: {present})")
    return columns[name]


def unbound(function: Any) -> Any:
    """The function within any number of ``functools.partial``."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def own_copies(value: Any, count: int) -> list[Any]:
    """``[count]`` copies of ``value`` that share nothing that can be edited; numbers and strings are not copied."""
    return [value if type(value) in _IMMUTABLE else copy.deepcopy(value) for _ in range(count)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """What a reward function can be called with, by its signature."""

    names: frozenset[str]
    """Its parameters that can be given by name."""
    takes_any: bool
    """Whether it has ``**columns``."""
    required: tuple[str, ...]
    """Names without a default that no run passes: columns that the dataset must have."""
    positional_only: tuple[str, ...]
    """Names without a default that cannot be given by name."""
    bound: frozenset[str]
    """Names that settings or ``functools.partial`` gave a value."""

    @classmethod
    def of(cls, function: Any) -> Parameters:
        """Read a function, a method, a callable object or a ``functools.partial``."""
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):  # Some callables written in C have no signature.
            nothing: frozenset[str] = frozenset()
            return cls(names=nothing, takes_any=True, required=(), positional_only=(), bound=nothing)
        needed = [item for item in parameters if item.default is item.empty]
        bound = frozenset(bound_arguments(function))
        return cls(
            names=frozenset(item.name for item in parameters if item.kind in _BY_NAME),
            takes_any=any(item.kind is item.VAR_KEYWORD for item in parameters),
            required=tuple(i.name for i in needed if i.kind in _BY_NAME and i.name not in REWARD_ARGUMENTS),
            positional_only=tuple(item.name for item in needed if item.kind is item.POSITIONAL_ONLY),
            bound=bound,
        )

    def takes(self, name: str) -> bool:
        """Whether an argument of that name can be passed."""
        return self.takes_any or name in self.names


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerState:
    """``trainer_state`` of reward functions: what is known of transformers' class of that name while a group is scored.

    Reading another of its attributes raises ``AttributeError``.
    """

    global_step: int = 0
    """Optimizer steps that the policy had made when it was asked for the completions."""
    max_steps: int = 0
    """Optimizer steps of the whole run."""
    epoch: float = 0.0
    """Prompts trained on by then / rows of the dataset."""

    def __getattr__(self, name: str) -> Any:
        """Name the attributes that exist."""
        raise AttributeError(f"trainer_state has global_step, max_steps and epoch here, and no {name!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingProgress:
    """How a run's counts follow from the policy version."""

    steps_per_version: int = 0
    max_steps: int = 0
    epochs_per_version: float = 0.0

    def at(self, version: int) -> TrainerState:
        """The state of training when ``version`` is the newest policy."""
        return TrainerState(
            global_step=version * self.steps_per_version,
            max_steps=self.max_steps,
            epoch=version * self.epochs_per_version,
        )


class CallLog:
    """What one call of a reward function reports besides rewards, by TRL's ``log_extra`` and ``log_metric``.

    Args:
        count: Completions of the call.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self.extras: dict[str, tuple[Any, ...]] = {}
        """Column -> ``[G]``."""
        self.metrics: dict[str, list[float]] = {}
        """Name -> the values of its calls."""

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Add a column to the completion tables.

        Args:
            column: Its name; a table has it as ``extra/<function>/<column>``.
            values: ``[G]``; what is neither a number, a text, a bool nor ``None`` is written as ``str`` has it.

        Raises:
            ValueError: There is not one value for each completion.
        """
        if len(values) != self._count:
            raise ValueError(f"log_extra({column!r}, ...) has {len(values)} values for {self._count} completions")
        self.extras[str(column)] = tuple(map(_plain, values))

    def log_metric(self, name: str, value: float) -> None:
        """Report a number; a result has the mean over all calls as ``rewards/<function>/<name>``.

        Raises:
            TypeError: It is no number.
            ValueError: The name is that of the mean reward.
        """
        if name == "mean":
            raise ValueError("log_metric('mean', ...): rewards/<function>/mean is the mean reward; take another name")
        self.metrics.setdefault(str(name), []).append(float(value))


def _plain(value: Any) -> Any:
    if getattr(value, "shape", None) == ():  # one of NumPy or torch
        value = value.item()
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
