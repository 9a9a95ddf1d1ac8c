"""The Ray actor that plays episodes, many at once: calls in, answers out, each as soon as it is there.

A call per step would cost more than most steps take. The driver posts what came up in a pass of its event loop, and
waits for whatever has been answered by then.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from rlhf_ray.environments.episode import Episode, EpisodeFailed, Reply, Sampled, Start
from rlhf_ray.pickling import deserialize
from rlhf_ray.untrusted_text import shortened

if TYPE_CHECKING:
    from rlhf_ray.environments.agent_server import AgentServer
    from rlhf_ray.environments.play import Language
    from rlhf_ray.environments.registry import NamedEnvironment

__all__ = ["Answer", "Call", "EnvironmentWorker", "WorkerSettings"]

_LOG = logging.getLogger(__name__)
_THREADS = 256
"""Steps of environments that are not async which run at the same time in a worker: most of them wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """What a worker is made from; travels to it."""

    environments: tuple[bytes, ...]
    """Each a :class:`NamedEnvironment`, serialized."""
    tokenizer: str | bytes
    """A folder or hub id, or a tokenizer, serialized."""
    trust_remote_code: bool
    chat_template: str | None
    """Text of the template; unset: the tokenizer's."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()
    """Schemas that prompts name."""
    keep_reasoning: bool = True
    parses_tools: bool = False
    prompt_column: str = "prompt"
    temperature: float = 1.0
    """Of the sampling, for agents that ask for another one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Something that an episode is to do."""

    number: int
    """Counts the calls of a pool; the answer has the same."""
    episode: int
    method: str
    """``begin``, ``step``, ``cut`` or ``close``."""
    argument: Start | Sampled | str | None = None


Answer: TypeAlias = tuple[int, Reply | EpisodeFailed]
"""The call's number, and what came of it."""


class EnvironmentWorker:
    """Plays episodes of a run's environments.

    Args:
        settings: What it is made from.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._environments: dict[str, NamedEnvironment] = {}
        self._episodes: dict[int, Episode] = {}
        self._languages: dict[str, Language] = {}
        self._answers: list[Answer] = []
        self._answered = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._executor = ThreadPoolExecutor(_THREADS, "environment")
        self._tokenizer: Any = None
        self._server: AgentServer | None = None

    async def ready(self) -> None:
        """Load the environments, once; not when the actor is made, since what goes wrong there loses its type."""
        if self._tokenizer is None:
            from rlhf_ray.rewards.workers import load_tokenizer

            # Tools that are not async wait there; the default has a few threads.
            asyncio.get_running_loop().set_default_executor(self._executor)

            for payload in self._settings.environments:
                environment = cast("NamedEnvironment", deserialize(payload))
                self._environments[environment.name] = environment
            self._tokenizer = load_tokenizer(self._settings.tokenizer, self._settings.trust_remote_code)

    async def post(self, calls: Sequence[Call]) -> None:
        """Begin to carry calls out; those of one episode come in their order."""
        for call in calls:
            task = asyncio.create_task(self._carry_out(call))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def answers(self) -> list[Answer]:
        """Wait until something is answered; returns all that is there."""
        await self._answered.wait()
        await asyncio.sleep(0)  # What is ready too goes along.
        self._answered.clear()
        answers, self._answers = self._answers, []
        return answers

    async def stop(self) -> None:
        """Close the episodes that are open and what they share, before the process is killed."""
        episodes, self._episodes = list(self._episodes.values()), {}
        await asyncio.gather(*map(self._close, episodes), return_exceptions=True)
        if self._server is not None:
            await self._server.stop()
        if (mcp_tools := sys.modules.get("rlhf_ray.environments.mcp_tools")) is not None:
            await asyncio.to_thread(mcp_tools.close_sessions)

    async def _carry_out(self, call: Call) -> None:
        answer: Reply | EpisodeFailed
        try:
            answer = await self._reply(call)
        except EpisodeFailed as failure:
            answer = EpisodeFailed(failure.kind, failure.message)  # Without what caused it, which may not travel.
        except Exception as error:
            _LOG.exception("an episode failed outside of the environment")
            answer = EpisodeFailed("raised", f"outside of the environment: {shortened(repr(error), 1000)}")
        self._answers.append((call.number, answer))
        self._answered.set()

    async def _reply(self, call: Call) -> Reply:
        if call.method == "close":
            if episode := self._episodes.pop(call.episode, None):
                await self._close(episode)
            return Reply()
        if call.method == "begin":
            start = call.argument
            assert isinstance(start, Start)
            episode = self._episodes[call.episode] = self._new_episode(start)
            return await episode.begin()
        episode = self._episodes[call.episode]
        if call.method == "cut":
            return await episode.cut(str(call.argument))
        assert isinstance(call.argument, Sampled)
        return await episode.step(call.argument)

    async def _close(self, episode: Episode) -> None:
        try:
            await episode.close()
        except EpisodeFailed as failure:
            # A thread cannot be ended but with its process: other episodes are played again elsewhere.
            _LOG.error("%s; this worker ends with it", failure.message)
            os._exit(1)

    def _agent_server(self) -> AgentServer:
        """One for all episodes; it opens a port when the first one needs it."""
        if self._server is None:
            from rlhf_ray.environments.agent_server import AgentServer

            self._server = AgentServer()
        return self._server

    def _new_episode(self, start: Start) -> Episode:
        environment, settings = self._environments[start.environment], self._settings
        language = self._language(start)
        if environment.is_agent:
            from rlhf_ray.environments.agent import AgentEpisode

            return AgentEpisode(
                environment.make(),
                start,
                language.chat,
                parses_tools=settings.parses_tools,
                keep_reasoning=settings.keep_reasoning,
                temperature=settings.temperature,
                server=self._agent_server(),
            )
        from rlhf_ray.environments.play import EnvironmentEpisode

        return EnvironmentEpisode(
            environment.name,
            environment.make,
            start,
            language,
            self._executor,
            prompt_column=settings.prompt_column,
        )

    def _language(self, start: Start) -> Language:
        """The one of a row, which may have arguments of the chat template of its own."""
        from rlhf_ray.environments.dialogue import ChatFormat
        from rlhf_ray.environments.play import Language

        settings = self._settings
        own = start.prompt.columns.get("chat_template_kwargs") or {}
        arguments = {**settings.chat_template_kwargs, **own}
        key = json.dumps(arguments, sort_keys=True, default=repr)
        if key not in self._languages:
            tools = arguments.pop("tools", None) or settings.tools
            self._languages[key] = Language(
                tokenizer=self._tokenizer,
                chat=ChatFormat(self._tokenizer, template=settings.chat_template, arguments=arguments),
                tools=tuple(tools),
                keep_reasoning=settings.keep_reasoning,
            )
        return self._languages[key]
