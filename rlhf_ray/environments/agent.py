"""An unchanged OpenAI agent plays an episode: its client's requests are the episode's turns.

::

    agent                                        driver
    client.chat.completions.create(...) -------> Reply.requests
                                                 tokens are sampled
    ChatCompletion <---------------------------- Sampled
    ...
    return reward -----------------------------> Reply(finish_reason="stop", final_reward=reward)
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import functools
import inspect
import math
import time
import traceback
from typing import Any

import numpy as np

from rlhf_ray.environments.agent_history import Conversation, History
from rlhf_ray.environments.agent_runner import Agent, CommandFailed, make_runner
from rlhf_ray.environments.agent_server import AgentServer
from rlhf_ray.environments.dialogue import ChatFormat
from rlhf_ray.environments.episode import EpisodeFailed, Reply, Request, Sampled, Start
from rlhf_ray.environments.openai_api import Answer, ChatCall, Offer, Refused, answer_of, models, parse_call
from rlhf_ray.errors import DataError
from rlhf_ray.types import ChatMessage
from rlhf_ray.untrusted_text import shortened

__all__ = ["AgentEpisode"]

_LIMITS = {
    "length": ("context_length_exceeded", "no tokens are left in this episode: see rollouts.max_new_tokens"),
    "turns": ("max_turns", "no turns are left in this episode: see environment.max_turns"),
}
# Requests that a moment has in common arrive within so many passes of the event loop.
_SETTLE_PASSES = 10
# Those of other threads and processes, within so many seconds.
_SETTLE_S = 0.005
# An agent may ask so often after it was told that nothing is left.
_MAX_REFUSED = 100


class _Asked:
    """A request of the agent, and where its answer goes."""

    def __init__(self, call: ChatCall) -> None:
        self.call = call
        self.answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.conversation: Conversation | None = None

    def resolve(self, answer: Answer) -> None:
        """Answer, if the agent still waits."""
        if not self.answer.done():
            self.answer.set_result(answer)


class AgentEpisode:
    """Plays one episode with an agent; see :class:`~rlhf_ray.environments.episode.Episode`.

    The agent is ``async def solve(row, client)``, ``def solve(row, client)``, which gets a thread, or
    ``{"command": "python agent.py"}``. It returns the reward. A function gets OpenAI's client; it may also ask for
    ``base_url`` and ``api_key`` by these names, for frameworks that make their own. A command finds both in its
    environment variables, reads the row as JSON from standard input, and prints its reward as the last line.

    A thread cannot be stopped from outside: :meth:`close` raises if one still runs, so that its worker is replaced.

    Args:
        agent: The setting ``environment.agent``.
        start: The episode; the agent gets a copy of the row.
        chat: How messages become tokens.
        model_name: Listed under ``/models``; requests may have any name.
        parses_tools: Whether the engine reads calls of tools from what was sampled, and the chat template writes tools;
            otherwise requests with tools are refused.
        temperature: What the policy is sampled at; requests for another one are logged.
        top_p: Likewise.
        server: Of this process, for agents that need a URL.
        idle_s: How long a step waits for the agent while other requests of it are being sampled. What it asks later
            is in the reply to one of these.
        close_s: How long the agent may take to end.

    Raises:
        ConfigError: The agent is no agent.
        ValueError: It needs a URL, and there is no server.
    """

    def __init__(
        self,
        agent: Agent,
        start: Start,
        chat: ChatFormat,
        *,
        model_name: str = "policy",
        parses_tools: bool = False,
        keep_reasoning: bool = True,
        temperature: float = 1.0,
        top_p: float = 1.0,
        server: AgentServer | None = None,
        idle_s: float = 0.05,
        close_s: float = 1.0,
    ) -> None:
        self._agent = agent
        self._runner = make_runner(agent)
        if self._runner.needs_url and server is None:
            raise ValueError("the agent needs a URL, so the episode needs a server")
        self._name = start.environment
        self._row = copy.deepcopy({**start.prompt.columns, "prompt": start.prompt.text})
        self._tokenizer: Any = chat.tokenizer
        self._history = History(chat, keep_reasoning=keep_reasoning)
        self._offer = Offer(model_name=model_name, parses_tools=parses_tools, temperature=temperature, top_p=top_p)
        self._server = server
        self._idle_s = idle_s
        self._close_s = close_s
        self._base_url = ""
        self._task: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self._step = 0
        self._num_requests = 0
        # Not yet given to the driver.
        self._asked: list[_Asked] = []
        self._at_driver: dict[int, _Asked] = {}
        self._limit: Refused | None = None
        self._num_refused = 0
        self._closed = False
        self._over = False
        self._end_given = False
        self._result: Any = None
        self._error: BaseException | None = None

    # --- what the worker calls ----------------------------------------------------------------------------------------

    async def begin(self) -> Reply:
        """Start the agent; the reply has its first requests.

        Raises:
            EpisodeFailed: It ended without any.
        """
        began = time.perf_counter()
        if self._runner.needs_url and self._server is not None:
            self._base_url = await self._server.add(self.answer)
        self._task = asyncio.create_task(self._play(), name=f"agent of {self._name}")
        return dataclasses.replace(await self._advance(), step_s=time.perf_counter() - began)

    async def step(self, sampled: Sampled) -> Reply:
        """Answer a request; several steps may be under way, and a later one takes over what the agent does next.

        Raises:
            EpisodeFailed: The agent raised, or returned no reward.
            ValueError: There is no such request.
        """
        began = time.perf_counter()
        asked = self._at_driver.pop(sampled.number, None)
        if asked is None and self._limit is not None:
            return Reply()
        if asked is None or asked.conversation is None:
            raise ValueError(f"request {sampled.number} is not pending")
        message = self._message(asked.call, sampled)
        num_prompt_tokens = asked.conversation.num_tokens
        asked.conversation.add_sampled(sampled, message)
        asked.resolve(
            answer_of(
                asked.call,
                message,
                finish_reason=sampled.finish_reason,
                num_prompt_tokens=num_prompt_tokens,
                num_sampled_tokens=len(sampled.token_ids),
                logprobs=self._logprobs(sampled) if asked.call.logprobs else (),
            )
        )
        reply = await self._advance()
        return dataclasses.replace(reply, message=message, step_s=time.perf_counter() - began)

    async def cut(self, reason: str) -> Reply:
        """Refuse pending and later requests; the agent may catch that and still return a reward.

        Args:
            reason: ``turns`` or ``length``.

        Raises:
            EpisodeFailed: It did not catch it, or keeps asking.
        """
        began = time.perf_counter()
        code, message = _LIMITS[reason]
        self._limit = Refused(message, code=code)
        for asked in [*self._at_driver.values(), *self._asked]:
            asked.resolve(self._limit.answer)
        self._at_driver.clear()
        self._asked.clear()
        return dataclasses.replace(await self._advance(), step_s=time.perf_counter() - began)

    async def close(self) -> None:
        """Cancel the agent, and kill the processes that it runs in.

        Raises:
            EpisodeFailed: It still runs: it swallows ``CancelledError``, or its thread does not end.
        """
        self._closed = True
        if self._server is not None and self._base_url:
            self._server.remove(self._base_url)
        if self._task is None:
            return
        for asked in [*self._at_driver.values(), *self._asked]:
            asked.answer.cancel()
        stopped = await self._runner.stop(self._close_s)
        attempts = 3
        for _ in range(attempts):
            if self._task.done():
                break
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=self._close_s / attempts)
        if not stopped or not self._task.done():
            raise EpisodeFailed("timeout", f"{self._name}: the agent still runs {self._close_s} s after its episode")

    # --- what the agent calls -----------------------------------------------------------------------------------------

    async def answer(self, method: str, path: str, body: bytes) -> Answer:
        """Answer a request to the API.

        Args:
            method: Of HTTP.
            path: Below the base URL.
            body: JSON.
        """
        try:
            if (method, path) == ("GET", "/models"):
                return models(self._offer)
            if (method, path) != ("POST", "/chat/completions"):
                raise _no_such_endpoint(method, path)
            return await self._completion(parse_call(body, self._offer))
        except Refused as refused:
            return refused.answer

    async def _completion(self, call: ChatCall) -> Answer:
        if self._limit is not None:
            await self._count_refused()
            raise self._limit
        if self._closed:
            await _forever()
        if self._over:
            raise Refused("the episode is over: the agent has returned its reward")
        asked = _Asked(call)
        self._asked.append(asked)
        self._news.set()
        try:
            return await asked.answer
        finally:
            # The agent no longer waits, and the driver has not heard of it.
            if asked in self._asked:
                self._asked.remove(asked)

    async def _count_refused(self) -> None:
        """Give others a turn, and stop an agent that asks again and again."""
        self._num_refused += 1
        self._news.set()
        await asyncio.sleep(0)
        if self._num_refused > _MAX_REFUSED:
            await _forever()

    # --- what happens in between --------------------------------------------------------------------------------------

    async def _play(self) -> None:
        try:
            self._result = await self._runner.run(self._row, self.answer, self._base_url)
        except BaseException as error:  # SystemExit too: it would end the worker.
            self._error = error
        self._over = True
        self._news.set()

    async def _advance(self) -> Reply:
        """Wait until the agent asks, ends, or waits for other answers."""
        self._step += 1
        step = self._step
        self._news.set()
        until = time.monotonic() + self._idle_s
        while True:
            self._news.clear()
            if step != self._step:
                return Reply()
            if self._asked and not self._over:
                await self._settle()
            if step == self._step and (self._over or self._num_refused > _MAX_REFUSED):
                return self._end()
            if step == self._step and (requests := self._take()):
                return Reply(requests=requests)
            if self._asked:
                continue
            try:
                async with asyncio.timeout(max(0.0, until - time.monotonic()) if self._at_driver else None):
                    await self._news.wait()
            except TimeoutError:
                return Reply()

    async def _settle(self) -> None:
        """Wait for the rest of requests that were made in parallel."""
        seen = 0
        while seen < len(self._asked):
            seen = len(self._asked)
            for _ in range(_SETTLE_PASSES):
                await asyncio.sleep(0)
            if not self._runner.on_loop:
                await asyncio.sleep(_SETTLE_S)

    def _take(self) -> tuple[Request, ...]:
        """Number the requests of this moment by what they say."""
        asked = sorted(self._asked, key=lambda one: one.call.sort_key)
        self._asked.clear()
        return tuple(request for one in asked if (request := self._request(one)))

    def _request(self, asked: _Asked) -> Request | None:
        call = asked.call
        try:
            asked.conversation, token_ids, messages = self._history.place(call.messages, call.tools)
        except DataError as failure:
            asked.resolve(Refused(str(failure), param="messages").answer)
            return None
        number = self._num_requests
        self._num_requests += 1
        self._at_driver[number] = asked
        return Request(
            number=number,
            sequence=asked.conversation.index,
            token_ids=np.asarray(token_ids, dtype=np.int32),
            messages=tuple(messages),
            max_tokens=call.max_tokens,
            stop=call.stop,
        )

    # --- what was sampled ---------------------------------------------------------------------------------------------

    def _message(self, call: ChatCall, sampled: Sampled) -> ChatMessage:
        message = dict(sampled.message or {"role": "assistant", "content": self._text(sampled, call.stop)})
        calls = message.pop("tool_calls", None)
        if not calls:
            return message
        # A turn that was cut must not be executed; frameworks raise where they find no text in it.
        if sampled.finish_reason == "length" or not call.tools:
            return {**message, "content": self._text(sampled, call.stop)}
        ids = [one.get("id") or f"call_{sampled.number}_{i}" for i, one in enumerate(calls)]
        return {**message, "tool_calls": [{**one, "id": call_id} for one, call_id in zip(calls, ids, strict=True)]}

    def _text(self, sampled: Sampled, stop: tuple[str, ...]) -> str:
        text: str = self._tokenizer.decode(sampled.token_ids.tolist(), skip_special_tokens=True)
        return text[: min((at for one in stop if (at := text.find(one)) >= 0), default=len(text))]

    def _logprobs(self, sampled: Sampled) -> list[tuple[str, float]]:
        ids = sampled.token_ids.tolist()
        return [(self._tokenizer.decode([i]), logprob) for i, logprob in zip(ids, sampled.logprobs, strict=True)]

    # --- how it ended -------------------------------------------------------------------------------------------------

    def _end(self) -> Reply:
        if not self._over:
            code = self._limit.code if self._limit else None
            raise EpisodeFailed("limit", f"{self._name}: the agent asked {_MAX_REFUSED} times more after {code}")
        if self._error is not None:
            kind = "limit" if self._ended_by_limit(self._error) else "raised"
            raise EpisodeFailed(kind, f"{self._name}: {_describe(self._error, self._agent)}")
        if not self._num_requests:
            raise EpisodeFailed("raised", f"{self._name}: the agent never calls the model")
        if self._end_given:
            return Reply()
        self._end_given = True
        return Reply(finish_reason="stop", final_reward=self._reward())

    def _ended_by_limit(self, error: BaseException | None) -> bool:
        if self._limit is None:
            return False
        if isinstance(error, CommandFailed):
            return True
        if isinstance(error, BaseExceptionGroup):
            return any(map(self._ended_by_limit, error.exceptions))
        while error is not None:
            if getattr(error, "code", None) == self._limit.code:
                return True
            # Frameworks wrap what the client raises.
            error = error.__cause__ or error.__context__
        return False

    def _reward(self) -> float:
        value = self._result
        remedy = "it must return the reward of the episode, a finite number"
        if isinstance(value, str) or not (hasattr(value, "__float__") or hasattr(value, "__index__")):
            given = shortened(repr(value), 80)
            raise EpisodeFailed("wrong_type", f"{self._name}: the agent returned {given}; {remedy}")
        try:
            reward = float(value)
        except OverflowError:
            reward = math.inf
        except (TypeError, ValueError, RuntimeError) as failure:  # Arrays and tensors of several elements.
            given = type(value).__name__
            raise EpisodeFailed("wrong_type", f"{self._name}: the agent returned {given}; {remedy}") from failure
        if not math.isfinite(reward):
            raise EpisodeFailed("not_finite", f"{self._name}: the agent returned {reward}; {remedy}")
        return reward


def _no_such_endpoint(method: str, path: str) -> Refused:
    if path.startswith("/responses"):
        message = (
            "the Responses API is not supported: use chat completions, for example OpenAIChatCompletionsModel of "
            "OpenAI's Agents SDK"
        )
    else:
        message = f"{method} {shortened(path, 80)} is not supported: only /chat/completions and /models are"
    return Refused(message, status=404)


async def _forever() -> None:
    await asyncio.get_running_loop().create_future()


def _describe(error: BaseException, agent: Agent) -> str:
    """One line: the exception, and the last place in the user's own file that it came through."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, CommandFailed):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == _source_file(agent)]
    place = next(iter((own or list(frames))[-1:]), None)
    where = f" ({place.filename}:{place.lineno} in {place.name})" if place else ""
    text = shortened(error)
    return f"the agent raised {type(error).__name__}{': ' if text else ''}{text}{where}"


def _source_file(agent: Agent) -> str | None:
    function: Any = agent
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function) if callable(function) else function
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return None if code is None else str(code.co_filename)
