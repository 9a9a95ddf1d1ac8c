"""Scores rollout groups: calls reward functions, checks what they answer, and adds it up by weight."""

from __future__ import annotations

import asyncio
import copy
import inspect
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from rlhf_ray.config.settings import REWARD_ARGUMENTS, RewardFunction
from rlhf_ray.errors import DataError
from rlhf_ray.prompts.tokenizer import decoded
from rlhf_ray.rewards.arguments import CallLog, TrainerState, messages_of, own_copies, unbound
from rlhf_ray.rewards.builtin.environment import is_environment
from rlhf_ray.rewards.functions import NamedReward
from rlhf_ray.types import Float32Array, RolloutGroup, ScoredGroup
from rlhf_ray.untrusted_text import shortened

__all__ = [
    "RewardScorer",
    "Scores",
    "ScoringError",
    "Tokenizer",
    "checked_answer",
    "decoded_texts",
    "logged_means",
    "scored_group",
]

Float64Array: TypeAlias = npt.NDArray[np.float64]


class Tokenizer(Protocol):
    """What scoring needs of a tokenizer."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """The text of ``token_ids``."""
        ...


class ScoringError(Exception):
    """A group's reward could not be computed; becomes a ``RewardFailure``.

    Args:
        kind: One of ``RewardFailure.kind``.
        message: One line that names the function and the cause.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)
        self.kind = kind
        self.message = message


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What one worker found of a group."""

    values: Mapping[str, Float64Array]
    """Name of a reward -> ``[G]``, NaN where the function answered ``None``."""
    texts: tuple[str, ...]
    """``[G]``"""
    reward_s: float
    """Seconds."""
    logged: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    """As a ``ScoredGroup`` has it, like ``extras``."""
    extras: Mapping[str, Sequence[Any]] = field(default_factory=dict)


def scored_group(group: RolloutGroup, rewards: Sequence[NamedReward], scores: Sequence[Scores]) -> ScoredGroup:
    """Add up what workers found of a group.

    Args:
        group: The group.
        rewards: All rewards of the run.
        scores: ``[workers]``, in which each reward is once.

    Raises:
        ScoringError: No reward applies to some completion, or a sum leaves float32's range.
    """
    found = {name: values for one in scores for name, values in one.values.items()}
    values = {reward.name: found[reward.name] for reward in rewards}
    return ScoredGroup(
        group=group,
        rewards=weighted_sum(list(values.values()), [reward.weight for reward in rewards]),
        rewards_by_function={name: of_reward.astype(np.float32) for name, of_reward in values.items()},
        texts=scores[0].texts,
        reward_s=max(one.reward_s for one in scores),
        logged={name: metrics for one in scores for name, metrics in one.logged.items()},
        extras={name: column for one in scores for name, column in one.extras.items()},
        environment_weight=sum(reward.weight for reward in rewards if is_environment(reward.function)),
    )


class RewardScorer:
    """Calls a run's reward functions.

    Functions that are not async are called in the thread of the event loop: those that use signals (time limits,
    mostly) need it to be the main thread.

    Args:
        rewards: The functions, at least one.
        tokenizer: Turns completions into text.
    """

    def __init__(self, rewards: Sequence[NamedReward], tokenizer: Tokenizer) -> None:
        self._rewards = tuple(rewards)
        self._tokenizer = tokenizer

    async def score(self, group: RolloutGroup) -> ScoredGroup:
        """Score ``group``.

        Raises:
            ScoringError: A function raised or answered something unusable, or none applies to some completion.
            DataError: A dataset column has the name of an argument that has a value already.
        """
        return scored_group(group, self._rewards, [await self.scores(group)])

    async def scores(self, group: RolloutGroup, state: TrainerState | None = None) -> Scores:
        """As :meth:`score`, before the answers are added up.

        Args:
            group: What is scored.
            state: ``trainer_state`` of the functions; unset: all zeros.
        """
        given = _Given(group, self._tokenizer, state or TrainerState())
        logs = {reward.name: CallLog(len(given.texts)) for reward in self._rewards}
        start = time.perf_counter()
        values = await self._answers(given, logs)
        return Scores(
            values=values,
            texts=given.texts,
            reward_s=time.perf_counter() - start,
            logged={name: log.metrics for name, log in logs.items() if log.metrics},
            extras={f"{name}/{column}": values for name, log in logs.items() for column, values in log.extras.items()},
        )

    async def _answers(self, given: _Given, logs: Mapping[str, CallLog]) -> dict[str, Float64Array]:
        """Name -> ``[G]``: of plain functions one after another, then of the async ones together."""
        plain = [reward for reward in self._rewards if not reward.is_async]
        answers = {reward.name: await self._answer(reward, given, logs[reward.name]) for reward in plain}
        try:
            async with asyncio.TaskGroup() as tasks:
                running = {
                    reward.name: tasks.create_task(self._answer(reward, given, logs[reward.name]))
                    for reward in self._rewards
                    if reward.is_async
                }
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return answers | {name: task.result() for name, task in running.items()}

    async def _answer(self, reward: NamedReward, given: _Given, log: CallLog) -> Float64Array:
        arguments = given.arguments(reward, log)
        try:
            answer = reward.function(**arguments)
            if inspect.isawaitable(answer):
                answer = await answer
        except (KeyboardInterrupt, asyncio.CancelledError):
            raise
        except BaseException as error:  # sys.exit() and math-verify's TimeoutException are no Exceptions.
            raise ScoringError("raised", _describe(error, reward)) from error
        return checked_answer(answer, reward.name, len(given.texts))


class _Given:
    """What the reward functions of a group are called with, in TRL's form.

    Raises:
        DataError: A dataset column has the name of an argument that every function receives.
    """

    def __init__(self, group: RolloutGroup, tokenizer: Tokenizer, state: TrainerState) -> None:
        if taken := sorted(REWARD_ARGUMENTS & group.prompt.columns.keys()):
            raise DataError(f"the dataset column {taken[0]!r} has the name of a reward argument: rename the column")
        self.texts = decoded_texts(group, tokenizer)
        self._prompt = group.prompt
        self._tokenizer = tokenizer
        self._trajectories = group.trajectories
        self._token_ids = [completion.token_ids.tolist() for completion in group.trajectories]
        self._state = state

    def arguments(self, reward: NamedReward, log: CallLog) -> dict[str, Any]:
        """Those that a function takes, all its own: what it edits is seen by nothing else.

        Raises:
            DataError: A column has the name of an argument that settings gave a value.
            ScoringError: The row lacks a column that the function needs.
        """
        prompt, count = self._prompt, len(self.texts)
        reward.check_bound(prompt.columns)
        try:
            reward.check_required(prompt.columns)
        except DataError as error:  # Of this row, where the first rows of the dataset have the column.
            raise ScoringError("raised", str(error)) from error
        makers: dict[str, Callable[[], Any]] = {
            "prompts": lambda: own_copies(prompt.text, count),
            "completions": lambda: self._as_completions(self.texts),
            "completion_ids": lambda: [list(ids) for ids in self._token_ids],
            "trainer_state": lambda: self._state,
            "log_extra": lambda: log.log_extra,
            "log_metric": lambda: log.log_metric,
            **{name: partial(own_copies, value, count) for name, value in prompt.columns.items()},
        }
        # Not for **columns: these are decoded once more.
        if "completions_with_special_tokens" in reward.parameters.names:
            makers["completions_with_special_tokens"] = lambda: self._as_completions(self._texts_with_special_tokens())
        if "turns" in reward.parameters.names:
            makers["turns"] = self._turns
        return {name: make() for name, make in makers.items() if reward.parameters.takes(name)}

    def _as_completions(self, texts: Sequence[str]) -> list[Any]:
        """For a string prompt a completion is its text, for a chat a list of messages, those of tools included."""
        if isinstance(self._prompt.text, str):
            return list(texts)
        return [
            copy.deepcopy(messages_of(trajectory)) or [{"role": "assistant", "content": text}]
            for trajectory, text in zip(self._trajectories, texts, strict=True)
        ]

    def _turns(self) -> list[list[dict[str, Any]]]:
        """``[G]`` lists: of each turn its text, its reward, its message and what was observed after it."""
        return [
            [
                {
                    "text": decoded(self._tokenizer, sequence.token_ids[turn.start : turn.end].tolist()),
                    "reward": turn.reward,
                    "message": copy.deepcopy(turn.message),
                    "observation": copy.deepcopy(list(turn.observation)),
                }
                for sequence in trajectory.sequences
                for turn in sequence.turns
            ]
            for trajectory in self._trajectories
        ]

    def _texts_with_special_tokens(self) -> list[str]:
        ends = {getattr(self._tokenizer, name, None) for name in ("eos_token_id", "pad_token_id")}
        bare = (ids[:-1] if ids and ids[-1] in ends else ids for ids in self._token_ids)
        return [decoded(self._tokenizer, ids, skip_special_tokens=False) for ids in bare]


def decoded_texts(group: RolloutGroup, tokenizer: Tokenizer) -> tuple[str, ...]:
    """``[G]``, special tokens left out."""
    return tuple(decoded(tokenizer, completion.token_ids.tolist()) for completion in group.trajectories)


def logged_means(groups: Iterable[ScoredGroup]) -> dict[str, dict[str, float]]:
    """Reward function -> metric -> mean over all calls that logged it."""
    values: dict[str, dict[str, list[float]]] = {}
    for scored in groups:
        for name, metrics in scored.logged.items():
            for metric, calls in metrics.items():
                values.setdefault(name, {}).setdefault(metric, []).extend(calls)
    return {name: {key: float(np.mean(calls)) for key, calls in metrics.items()} for name, metrics in values.items()}


def checked_answer(answer: object, name: str, count: int) -> Float64Array:
    """A function's answer as ``[G]``, NaN for ``None``.

    Raises:
        ScoringError: It is not a list of ``count`` finite numbers or ``None``.
    """
    if not isinstance(answer, (list, tuple)) and hasattr(answer, "tolist"):
        answer = answer.tolist()  # a NumPy array or a torch tensor
    if not isinstance(answer, (list, tuple)):
        raise ScoringError("wrong_type", f"{name} returned {type(answer).__name__}, not a list of numbers")
    if len(answer) != count:
        raise ScoringError("wrong_length", f"{name} returned {len(answer)} rewards for {count} completions")
    values = np.array([np.nan if item is None else _number(item, name) for item in answer], dtype=np.float64)
    with np.errstate(over="ignore"):
        unusable = ~np.isfinite(values.astype(np.float32))
    for index, item in enumerate(answer):
        if item is not None and unusable[index]:
            raise ScoringError("not_finite", f"{name} returned {values[index]} for completion {index}")
    return values


def weighted_sum(answers: Sequence[Float64Array], weights: Sequence[float]) -> Float32Array:
    """``[F][G] -> [G]``: for each completion the sum of weight times reward over the rewards that apply to it.

    Weights are not renormalized where a reward does not apply.

    Raises:
        ScoringError: No reward applies to some completion, or a sum leaves float32's range.
    """
    table = np.stack(answers)
    nowhere = np.flatnonzero(np.isnan(table).all(axis=0))
    if nowhere.size:
        raise ScoringError("all_none", f"every reward function answered None for completion {nowhere[0]}")
    with np.errstate(over="ignore"):
        weighted = table * np.asarray(weights, dtype=np.float64)[:, None]
        rewards: Float32Array = np.nansum(weighted, axis=0).astype(np.float32)
    if not np.isfinite(rewards).all():
        raise ScoringError("not_finite", "the weighted sum of the rewards is beyond float32's range")
    return rewards


def _number(item: Any, name: str) -> float:
    # Asking for the methods rather than trying float() keeps strings out, "1.0" included.
    if hasattr(item, "__float__") or hasattr(item, "__index__"):
        try:
            return float(item)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # arrays, tensors of several elements, 10**400
            pass
    raise ScoringError(
        "wrong_type", f"{name} returned {shortened(repr(item), 80)} ({type(item).__name__}), not a number or None"
    )


def _describe(error: BaseException, reward: NamedReward) -> str:
    """One line: the exception, and the last place in the user's own file that it came through."""
    text = shortened(error)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    own = [frame for frame in frames if frame.filename == _source_file(reward.function)]
    place = next(iter((own or frames)[-1:]), None)
    where = f" ({place.filename}:{place.lineno} in {place.name})" if place else ""
    return f"{reward.name} raised {type(error).__name__}{': ' if text else ''}{text}{where}"


def _source_file(function: RewardFunction) -> str | None:
    function = inspect.unwrap(unbound(function))
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return None if code is None else str(code.co_filename)
