"""What the rollout loop does with an agent's episode, with a policy that is a Python function."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from environments.chat_templates import QWEN_2_5, byte_tokenizer

from rlhf_ray.environments.agent import AgentEpisode
from rlhf_ray.environments.dialogue import ChatFormat
from rlhf_ray.environments.episode import Reply, Request, Sampled, Start
from rlhf_ray.types import Prompt

Policy = Callable[[Request, str], Any]
"""Takes a request and the text of all its sequence; gives a text, or a message with calls of tools."""


@functools.cache
def chat_format() -> ChatFormat:
    return ChatFormat(byte_tokenizer(QWEN_2_5))


def start_of(text: Any = "2+2?", **columns: Any) -> Start:
    prompt = Prompt(prompt_id=3, token_ids=np.zeros(1, np.int32), text=text, columns=columns)
    return Start(prompt=prompt, seed=7, environment="shop")


def call_of(name: str, /, *, call_id: str | None = "c1", **arguments: Any) -> dict[str, Any]:
    """A message that calls a tool, as the engine's parser reads it."""
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


class Driver:
    """Samples every request of an episode as soon as it comes, in parallel."""

    def __init__(self, episode: AgentEpisode, policy: Policy, *, delay: Callable[[], float] = lambda: 0.0) -> None:
        self.episode = episode
        self.policy = policy
        self.delay = delay
        self.max_turns: int | None = None
        self.cut_reason = "turns"
        self.finish_reason = "stop"
        self.tokens: dict[int, list[int]] = {}
        self.requests: list[Request] = []
        self.replies: list[Reply] = []
        self.end: Reply | None = None
        self._turns = 0

    async def play(self) -> Reply:
        """Begin, and continue until the episode is over; it is closed in any case."""
        try:
            await self._follow(await self.episode.begin())
            assert self.end is not None
            return self.end
        finally:
            await self.episode.close()

    def text(self, sequence: int) -> str:
        """All tokens of a sequence, decoded."""
        return str(chat_format().tokenizer.decode(self.tokens[sequence]))

    def sampled(self, request: Request) -> Sampled:
        """What the policy answers; its tokens end the turn."""
        answer = self.policy(request, self.text(request.sequence))
        message = answer if isinstance(answer, dict) else None
        text = json.dumps(answer["tool_calls"]) if message and "tool_calls" in message else answer
        text = text["content"] if isinstance(text, dict) else text
        end = [] if self.finish_reason == "length" else chat_format().tokenizer.encode("<|im_end|>")
        ids = [*chat_format().tokenizer.encode(text), *end]
        return Sampled(
            number=request.number,
            token_ids=np.asarray(ids, np.int32),
            logprobs=tuple(-0.5 * i for i in range(len(ids))),
            finish_reason=self.finish_reason,
            message=message,
        )

    async def _follow(self, reply: Reply) -> None:
        self.replies.append(reply)
        if reply.finish_reason is not None:
            assert self.end is None, "an episode ends once"
            self.end = reply
        for request in reply.requests:
            assert request.number == len(self.requests), "requests are numbered in order"
            assert request.sequence <= len(self.tokens), "sequences are numbered in order"
            self.requests.append(request)
            self.tokens.setdefault(request.sequence, []).extend(request.token_ids.tolist())
        await asyncio.gather(*map(self._turn, reply.requests))

    async def _turn(self, request: Request) -> None:
        await asyncio.sleep(self.delay())
        self._turns += 1
        if self.max_turns is not None and self._turns > self.max_turns:
            await self._follow(await self.episode.cut(self.cut_reason))
            return
        sampled = self.sampled(request)
        self.tokens[request.sequence] += sampled.token_ids.tolist()
        await self._follow(await self.episode.step(sampled))


async def play(
    agent: Any, policy: Policy = lambda request, text: "4", start: Start | None = None, **options: Any
) -> Driver:
    """Play one episode to its end."""
    driver = Driver(AgentEpisode(agent, start or start_of(), chat_format(), **options), policy)
    await driver.play()
    return driver
