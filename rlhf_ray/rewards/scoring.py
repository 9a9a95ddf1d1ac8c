"""Rewards, step three of the loop: one rollout group in, its checked and weighted rewards out.

Plain Python: the Ray actors in ``worker.py`` only construct a :class:`RewardScorer` and forward to it.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from rlhf_ray.errors import DataError
from rlhf_ray.prompts.tokenizer import decoded
from rlhf_ray.rewards.functions import NamedReward
from rlhf_ray.settings import RewardFunction
from rlhf_ray.types import Float32Array, RolloutGroup, ScoredGroup

__all__ = ["RewardScorer", "Scores", "ScoringError", "Tokenizer"]

Float64Array: TypeAlias = npt.NDArray[np.float64]

MAX_MESSAGE_CHARS = 500


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
    """What a ``ScoredGroup`` adds to its group: all that travels back from a reward worker."""

    rewards: Float32Array
    """``[G]``"""
    rewards_by_function: Mapping[str, Float32Array]
    """Name -> ``[G]``, NaN where the function answered ``None``."""
    texts: tuple[str, ...]
    """``[G]``"""
    reward_s: float
    """Seconds."""

    def of(self, group: RolloutGroup) -> ScoredGroup:
        """The scored group."""
        return ScoredGroup(
            group=group,
            rewards=self.rewards,
            rewards_by_function=self.rewards_by_function,
            texts=self.texts,
            reward_s=self.reward_s,
        )


class RewardScorer:
    """Scores groups with a run's reward functions.

    Args:
        rewards: The functions, at least one.
        tokenizer: Turns completions into text.
        threaded: Call functions that are not async in a thread, so that the event loop goes on. Off: call them where
            ``score`` runs, which functions that use signals (time limits, mostly) need to be the main thread.
        part_of_sum: A reward model adds to the sum, so that no function need apply to a completion.
    """

    def __init__(
        self,
        rewards: Sequence[NamedReward],
        tokenizer: Tokenizer,
        *,
        threaded: bool = True,
        part_of_sum: bool = False,
    ) -> None:
        self._rewards = tuple(rewards)
        self._tokenizer = tokenizer
        self._threaded = threaded
        self._part_of_sum = part_of_sum

    async def score(self, group: RolloutGroup) -> ScoredGroup:
        """Score ``group``.

        Raises:
            ScoringError: A function raised or answered something unusable, or none applies to some completion.
            DataError: A dataset column has the name of an argument that every reward function receives.
        """
        return (await self.scores(group)).of(group)

    async def scores(self, group: RolloutGroup) -> Scores:
        """As :meth:`score`, without the group itself in the answer."""
        texts = tuple(decoded(self._tokenizer, completion.token_ids.tolist()) for completion in group.completions)
        arguments = reward_arguments(group, texts)
        start = time.perf_counter()
        answers = await self._answers(arguments, len(texts))
        return Scores(
            rewards=weighted_sum(answers, [reward.weight for reward in self._rewards], part_of_sum=self._part_of_sum),
            rewards_by_function={
                reward.name: answer.astype(np.float32) for reward, answer in zip(self._rewards, answers, strict=True)
            },
            texts=texts,
            reward_s=time.perf_counter() - start,
        )

    async def _answers(self, arguments: Mapping[str, list[Any]], count: int) -> list[Float64Array]:
        """``[F][G]``: plain functions one after another, then the async ones together."""
        answers = {
            reward.name: await self._answer(reward, arguments, count) for reward in self._rewards if not reward.is_async
        }
        try:
            async with asyncio.TaskGroup() as tasks:
                running = {
                    reward.name: tasks.create_task(self._answer(reward, arguments, count))
                    for reward in self._rewards
                    if reward.is_async
                }
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        answers |= {name: task.result() for name, task in running.items()}
        return [answers[reward.name] for reward in self._rewards]

    async def _answer(self, reward: NamedReward, arguments: Mapping[str, list[Any]], count: int) -> Float64Array:
        # Lists of its own, so that a function that sorts or empties one does not do it to the next function.
        own = {name: list(values) for name, values in arguments.items()}
        if self._threaded and not reward.is_async:
            answer = await asyncio.to_thread(_call, reward, own)
        else:
            answer = _call(reward, own)
        if inspect.isawaitable(answer):
            try:
                answer = await answer
            except (KeyboardInterrupt, asyncio.CancelledError):
                raise
            except BaseException as error:
                raise ScoringError("raised", _describe(error, reward)) from error
        return checked_answer(answer, reward.name, count)


def reward_arguments(group: RolloutGroup, texts: Sequence[str]) -> dict[str, list[Any]]:
    """Keyword arguments of a reward function, each a list of ``[G]``: TRL's form.

    For a string prompt a completion is its text, for a chat a list with one assistant message.

    Raises:
        DataError: A dataset column has the name of one of the first three.
    """
    prompt = group.prompt
    chat = not isinstance(prompt.text, str)
    arguments: dict[str, list[Any]] = {
        "prompts": [prompt.text] * len(texts),
        "completions": [[{"role": "assistant", "content": text}] for text in texts] if chat else list(texts),
        "completion_ids": [completion.token_ids.tolist() for completion in group.completions],
    }
    taken = sorted(arguments.keys() & prompt.columns.keys())
    if taken:
        raise DataError(f"the dataset column {taken[0]!r} has the name of a reward argument: rename the column")
    return arguments | {name: [value] * len(texts) for name, value in prompt.columns.items()}


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


def weighted_sum(
    answers: Sequence[Float64Array], weights: Sequence[float], *, part_of_sum: bool = False
) -> Float32Array:
    """``[F][G] -> [G]``: for each completion the sum of weight times reward over the functions that apply to it.

    Weights are not renormalised where a function does not apply.

    Raises:
        ScoringError: No function applies to some completion, and this is not ``part_of_sum``; or a sum leaves
            float32's range.
    """
    table = np.stack(answers)
    nowhere = np.flatnonzero(np.isnan(table).all(axis=0))
    if nowhere.size and not part_of_sum:
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
    raise ScoringError("wrong_type", f"{name} returned {item!r:.80} ({type(item).__name__}), not a number or None")


def _call(reward: NamedReward, arguments: Mapping[str, list[Any]]) -> Any:
    try:
        return reward.function(**arguments)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        # All of them: sys.exit() and math-verify's TimeoutException are no Exceptions, and a StopIteration that is
        # let through to the thread's future would leave its awaiter waiting for ever.
        raise ScoringError("raised", _describe(error, reward)) from error


def _describe(error: BaseException, reward: NamedReward) -> str:
    """One line: the exception, and the last place in the user's own file that it came through."""
    text = " ".join(str(error).split())[:MAX_MESSAGE_CHARS]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    own = [frame for frame in frames if frame.filename == _source_file(reward.function)]
    place = next(iter((own or frames)[-1:]), None)
    where = f" ({place.filename}:{place.lineno} in {place.name})" if place else ""
    return f"{reward.name} raised {type(error).__name__}{': ' if text else ''}{text}{where}"


def _source_file(function: RewardFunction) -> str | None:
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return None if code is None else str(code.co_filename)
