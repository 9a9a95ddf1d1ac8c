"""Plays an :class:`Environment`: decodes what was sampled, steps it, and makes tokens of what it answers."""

from __future__ import annotations

import asyncio
import copy
import inspect
import logging
import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_ray.environments.dialogue import ChatFormat, Dialogue, HistoryRewritten, text_suffix_ids
from rlhf_ray.environments.environment import Action, Observation, Step
from rlhf_ray.environments.episode import EpisodeFailed, Reply, Request, Sampled, Start
from rlhf_ray.errors import DataError
from rlhf_ray.prompts.tokenizer import decoded, special_tokens_around, with_special_tokens
from rlhf_ray.types import ChatMessage
from rlhf_ray.untrusted_text import shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["EnvironmentEpisode", "Language", "own_line"]


_LOG = logging.getLogger(__name__)
_OWN_METRICS = frozenset({"reward_mean", "steps_mean", "step_s", "failures"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Language:
    """How texts and messages become tokens, and back."""

    tokenizer: PreTrainedTokenizerBase
    chat: ChatFormat
    tools: Sequence[Mapping[str, Any]] = ()
    """Schemas of the tools that prompts name."""
    keep_reasoning: bool = True


class EnvironmentEpisode:
    """One episode of a user's environment.

    Args:
        name: What messages call the environment.
        make: Makes the environment's object.
        start: Prompt and seed.
        language: Tokenizer and chat template.
        executor: Runs the user's code where it is not async; the event loop must not wait for it.
        prompt_column: Under which name the row has its prompt.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], Any],
        start: Start,
        language: Language,
        executor: Executor,
        *,
        prompt_column: str = "prompt",
    ) -> None:
        self._name = name
        self._make = make
        self._start = start
        self._language = language
        self._executor = executor
        self._prompt_column = prompt_column
        self._environment: Any = None
        self._dialogue: Dialogue | None = None
        self._step_s = 0.0
        self._sequences = 1
        self._number = 0

    async def begin(self) -> Reply:
        """Make and reset the environment; the reply asks for the first turn."""
        prompt = self._start.prompt
        self._environment = await self._call("__init__", self._make)
        row = copy.deepcopy({**prompt.columns, self._prompt_column: prompt.text})
        observation = await self._call("reset", self._environment.reset, row, self._start.seed)
        if observation is None:
            text, ids = prompt.text, prompt.token_ids.tolist()
            if not isinstance(text, str):
                self._dialogue = self._new_dialogue(text)
        else:
            self._check_observation(observation, "reset")
            is_chat = not isinstance(prompt.text, str) or not isinstance(observation, str)
            text = _as_messages(observation) if is_chat else observation
            if isinstance(text, str):
                tokenizer = self._language.tokenizer
                ids = with_special_tokens(text_suffix_ids(tokenizer, text), special_tokens_around(tokenizer)[0])
            else:
                self._dialogue = self._new_dialogue(text)
                ids = self._dialogue.prompt_ids()
        if not ids:
            raise EpisodeFailed("wrong_type", f"{self._name}: reset gave an empty prompt; a prompt needs a token")
        request = Request(
            number=0,
            sequence=0,
            token_ids=np.asarray(ids, dtype=np.int32),
            messages=() if isinstance(text, str) else tuple(text),
            text=text if isinstance(text, str) else None,
        )
        return Reply(requests=(request,), step_s=self._take_time())

    async def step(self, sampled: Sampled) -> Reply:
        """Step the environment with what was sampled."""
        ids = sampled.token_ids.tolist()
        text = decoded(self._language.tokenizer, ids)
        message = sampled.message or {"role": "assistant", "content": text}
        action = Action(
            text=text,
            message=copy.deepcopy(message),
            token_ids=tuple(ids),
            truncated=sampled.finish_reason == "length",
        )
        step = await self._call("step", self._environment.step, action)
        self._check_step(step)
        given: dict[str, Any] = {
            "message": message if self._dialogue is not None else None,
            "reward": float(step.reward),
            "metrics": dict(step.metrics),
            "step_s": self._take_time(),
        }
        if step.done or step.truncated:
            return Reply(finish_reason="stop" if step.done else "environment", **given)
        try:
            request = self._next_request(ids, message, step.observation)
        except DataError as error:
            raise EpisodeFailed("raised", f"{self._name}: the observation cannot be written: {error}") from error
        return Reply(requests=(request,), **given)

    async def cut(self, reason: str) -> Reply:
        """Nothing more to say: the rewards of turns are given."""
        return Reply()

    async def close(self) -> None:
        """Close the environment; what goes wrong there is of no consequence for what was sampled."""
        environment, self._environment = self._environment, None
        if close := getattr(environment, "close", None):
            try:
                await self._call("close", close)
            except EpisodeFailed as failure:
                _LOG.warning("%s", failure.message)

    def _next_request(self, ids: list[int], message: ChatMessage, observation: Observation | None) -> Request:
        self._number += 1
        if self._dialogue is None:
            text = observation if observation is not None else ""
            if not isinstance(text, str):
                remedy = "the prompt is a text, so observations must be texts; give prompts as chats (data.as_chat)"
                raise EpisodeFailed("wrong_type", f"{self._name}: step gave messages, and {remedy}")
            new = text_suffix_ids(self._language.tokenizer, text)
            messages = _as_messages(text) if text else []
        else:
            self._dialogue.add_sampled(ids, message)
            messages = _as_messages(observation) if observation is not None else []
            try:
                new = self._dialogue.append(messages)
            except HistoryRewritten:
                self._sequences += 1
                return Request(
                    number=self._number,
                    sequence=self._sequences - 1,
                    token_ids=np.asarray(self._dialogue.prompt_ids(), dtype=np.int32),
                    messages=tuple(self._dialogue.messages),
                )
        return Request(
            number=self._number,
            sequence=self._sequences - 1,
            token_ids=np.asarray(new, dtype=np.int32),
            messages=tuple(messages),
        )

    def _new_dialogue(self, messages: Sequence[ChatMessage]) -> Dialogue:
        language = self._language
        return Dialogue(language.chat, messages, language.tools, keep_reasoning=language.keep_reasoning)

    async def _call(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call the user's code; where it is not async, in a thread.

        Raises:
            EpisodeFailed: It raised.
        """
        started = time.perf_counter()
        try:
            if inspect.iscoroutinefunction(function):
                answer = await function(*arguments)
            else:
                answer = await asyncio.get_running_loop().run_in_executor(self._executor, _caught, function, arguments)
                if isinstance(answer, _Raised):
                    raise answer.error
        except (asyncio.CancelledError, EpisodeFailed):
            raise
        except BaseException as error:  # sys.exit() is no Exception.
            text = shortened(error)
            place = own_line(error, self._make)
            message = f"{self._name}: {what} raised {type(error).__name__}{': ' if text else ''}{text}{place}"
            raise EpisodeFailed("raised", message) from error
        finally:
            self._step_s += time.perf_counter() - started
        return answer

    def _take_time(self) -> float:
        seconds, self._step_s = self._step_s, 0.0
        return seconds

    def _check_step(self, step: Any) -> None:
        if not isinstance(step, Step):
            raise EpisodeFailed(
                "wrong_type", f"{self._name}: step returned {type(step).__name__}; return rlhf_ray.Step(...)"
            )
        reward = step.reward
        if taken := sorted(_OWN_METRICS.intersection(step.metrics)):
            message = f"{self._name}: step reports the metric {taken[0]!r}, which every environment has; rename it"
            raise EpisodeFailed("wrong_type", message)
        if not hasattr(reward, "__float__"):
            message = f"{self._name}: step gave the reward {shortened(repr(reward), 80)}, not a number"
            raise EpisodeFailed("wrong_type", message)
        if not math.isfinite(float(reward)):
            raise EpisodeFailed("not_finite", f"{self._name}: step gave the reward {float(reward)}")
        if step.observation is not None:
            self._check_observation(step.observation, "step")

    def _check_observation(self, observation: Any, what: str) -> None:
        if isinstance(observation, str):
            return
        is_messages = isinstance(observation, Sequence) and all(
            isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in observation
        )
        if not is_messages:
            message = f"{self._name}: {what} gave the observation {shortened(repr(observation), 80)}"
            raise EpisodeFailed("wrong_type", f"{message}; give a text, or messages with role and content")


class _Raised:
    """An error of a thread: an executor would not pass ``SystemExit`` or ``StopIteration`` on."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


def _caught(function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    try:
        return function(*arguments)
    except BaseException as error:
        return _Raised(error)


def own_line(error: BaseException, made: Any) -> str:
    """The last place in the user's own file that an error came through, in brackets; nothing where there is none."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/rlhf_ray/" not in frame.filename]
    function = inspect.unwrap(getattr(made, "func", made))
    try:
        source = inspect.getsourcefile(function)
    except TypeError:
        source = None
    own = [frame for frame in frames if frame.filename == source]
    place = next(iter((own or frames)[-1:]), None)
    return f" ({place.filename}:{place.lineno} in {place.name})" if place else ""


def _as_messages(observation: Observation) -> list[ChatMessage]:
    if isinstance(observation, str):
        return [{"role": "user", "content": observation}]
    return [dict(message) for message in observation]
