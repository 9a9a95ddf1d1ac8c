"""Rollouts of several turns: the policy and its environment take turns until one of them, or a limit, ends it.

::

    begin G episodes -> one prompt -> first turn, sampled for all at once
    each alone:  sampled tokens -> Played.step -> observed tokens -> next turn, on the same replica -> ...
    joined to a Trajectory: what was sampled and what was observed, end to end, nothing rendered anew

A rollout touches arrays only: environments, templates and tokenizers are in the workers.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rlhf_ray.config.settings import Settings
from rlhf_ray.environments.episode import EpisodeFailed, Reply, Request, Sampled, Start
from rlhf_ray.environments.pool import EnvironmentPool, Played
from rlhf_ray.rollouts.rollouter import Engine, Seeds
from rlhf_ray.rollouts.streams import cancel_all
from rlhf_ray.rollouts.turn_order import TurnTime, followers
from rlhf_ray.types import (
    ChatMessage,
    FurtherSequence,
    Int32Array,
    Prompt,
    RewardFailure,
    RolloutGroup,
    SamplingSettings,
    Trajectory,
    Turn,
    VersionSpan,
)

__all__ = ["MultiTurn", "TurnLimits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnLimits:
    """How long trajectories get."""

    max_turns: int
    max_turn_tokens: int | None
    """``None``: what the trajectory has left."""
    max_prompt_tokens: int
    timeout_s: float

    @classmethod
    def of(cls, settings: Settings, max_prompt_tokens: int) -> TurnLimits:
        """Those of a run."""
        environment = settings.environment
        return cls(
            max_turns=environment.max_turns,
            max_turn_tokens=environment.max_turn_tokens,
            max_prompt_tokens=max_prompt_tokens,
            timeout_s=environment.timeout_s,
        )


class MultiTurn:
    """Trajectories of a policy and its environment.

    Args:
        pool: The environment workers.
        limits: Of trajectories.
        environment: Name of the environment of rows that name none.
        names: All environments of the run.
        column: Where rows name theirs; ``None``: they do not.
        parse: Whether the engine reads what was sampled as messages.
        tools: JSON of the schemas of the tools that prompts name.
    """

    def __init__(
        self,
        pool: EnvironmentPool,
        limits: TurnLimits,
        *,
        names: Sequence[str],
        column: str | None = None,
        parse: bool = False,
        tools: str = "",
    ) -> None:
        self._pool = pool
        self._limits = limits
        self._names = tuple(names)
        self._column = column
        self._parse = parse
        self._tools = tools

    async def rollout(self, prompt: Prompt, engine: Engine, seeds: Seeds) -> RolloutGroup | RewardFailure:
        """See :meth:`Rollouter.rollout`; an episode that fails is the failure of its group."""
        name = self._names[0] if self._column is None else str(prompt.columns.get(self._column))
        engine = replace(engine, sampling=replace(engine.sampling, parse=self._parse, tools=self._tools))
        episodes: list[Played] = []
        try:
            if name not in self._names:
                known = ", ".join(self._names)
                raise EpisodeFailed("wrong_type", f"column {self._column!r} names {name!r}; there are {known}")
            start = Start(prompt=prompt, seed=seeds.environment, environment=name)
            episodes += [self._pool.play(start) for _ in range(engine.sampling.group_size)]
            async with asyncio.timeout(self._limits.timeout_s) as limit:
                return await self._group(prompt, name, episodes, engine, seeds)
        except EpisodeFailed as failure:
            kind, message = failure.kind, failure.message
        except TimeoutError:
            if not limit.expired():
                raise
            kind = "timeout"
            message = f"{name}: the episode took longer than environment.timeout_s = {self._limits.timeout_s:g} s"
        finally:
            for episode in episodes:
                episode.close()
        return RewardFailure(group_id=prompt.prompt_id, kind=kind, message=message, environment=name)

    async def _group(
        self, prompt: Prompt, name: str, episodes: Sequence[Played], engine: Engine, seeds: Seeds
    ) -> RolloutGroup:
        replies = await _all(*(episode.begin() for episode in episodes))
        first = replies[0].requests[0]
        for reply in replies:
            if not np.array_equal(reply.requests[0].token_ids, first.token_ids):
                message = "episodes of one seed begin with different prompts: make what reset() draws follow from seed"
                raise EpisodeFailed("not_seeded", f"{name}: {message}")
        self._check_prompt(first.token_ids, name)
        text = list(first.messages) if first.text is None else first.text
        begun = replace(prompt, token_ids=first.token_ids, text=text)
        trajectories = [
            _Play(episode, index, begun, engine, seeds, self._limits, name) for index, episode in enumerate(episodes)
        ]
        first_engine = replace(engine, sampling=trajectories[0].sampling(first))
        longest = trajectories[0].longest(first)
        shared = await first_engine.sample(begun, seed=seeds.first_turn, max_tokens=longest)
        await _all(
            *(
                play.run(reply, sampled, shared.replica_id)
                for play, reply, sampled in zip(trajectories, replies, shared.trajectories, strict=True)
            )
        )
        return RolloutGroup(
            group_id=prompt.prompt_id,
            prompt=begun,
            trajectories=tuple(play.trajectory() for play in trajectories),
            replica_id=shared.replica_id,
            environment=name,
        )

    def _check_prompt(self, token_ids: Int32Array, name: str) -> None:
        longest = self._limits.max_prompt_tokens
        if len(token_ids) > longest:
            message = f"a prompt of {len(token_ids)} tokens, more than rollouts.max_prompt_tokens = {longest}"
            raise EpisodeFailed("too_long", f"{name}: {message}")


@dataclass(slots=True)
class _Sequence:
    """One sequence of a trajectory, as it grows."""

    prompt: Int32Array
    pieces: list[Int32Array] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    spans: list[VersionSpan] = field(default_factory=list)
    asked_version: int | None = None
    replica_id: str = ""
    length: int = 0

    def observe(self, token_ids: Int32Array, messages: tuple[ChatMessage, ...]) -> None:
        """Append what the environment answered."""
        self.pieces.append(token_ids)
        self.logprobs.append(np.zeros(len(token_ids), dtype=np.float32))
        self.length += len(token_ids)
        self.turns[-1] = replace(self.turns[-1], observation=messages)

    def sampled(self, turn: Trajectory, replica_id: str, number: int) -> int:
        """Append a turn; returns its place among the turns of this sequence."""
        start = self.length
        self.pieces.append(turn.token_ids)
        self.logprobs.append(turn.sampling_logprobs)
        self.length += len(turn.token_ids)
        self.turns.append(Turn(start=start, end=self.length, number=number))
        for span in turn.version_spans:
            self.spans.append(replace(span, start=span.start + start, end=span.end + start))
        if self.asked_version is None:
            self.asked_version = turn.asked_version
        self.replica_id = replica_id
        return len(self.turns) - 1

    @property
    def token_ids(self) -> Int32Array:
        """All tokens so far, ``[P + T]``."""
        return np.concatenate([self.prompt, *self.pieces])

    def trajectory(self, finish_reason: str) -> Trajectory:
        """What was recorded."""
        assert self.asked_version is not None
        return Trajectory(
            token_ids=np.concatenate(self.pieces).astype(np.int32, copy=False),
            sampling_logprobs=np.concatenate(self.logprobs).astype(np.float32, copy=False),
            turns=tuple(self.turns),
            version_spans=tuple(self.spans),
            asked_version=self.asked_version,
            finish_reason=finish_reason,
        )


class _Play:
    """One trajectory in the making.

    Args:
        episode: Its environment.
        index: In its group.
        prompt: Of the group.
        engine: The replicas, with the sampling settings of the rollout.
        seeds: Of the group.
        limits: Of trajectories.
        name: Of the environment.
    """

    def __init__(
        self,
        episode: Played,
        index: int,
        prompt: Prompt,
        engine: Engine,
        seeds: Seeds,
        limits: TurnLimits,
        name: str,
    ) -> None:
        self._episode = episode
        self._index = index
        self._prompt = prompt
        self._engine = engine
        self._seeds = seeds
        self._limits = limits
        self._name = name
        self._sequences = [_Sequence(prompt.token_ids)]
        self._turns = 0
        self._left = engine.sampling.max_new_tokens
        self._newest = engine.version
        self._prefixes: Counter[bytes] = Counter()
        self._num_answers = 0
        self._known: dict[int, int] = {}
        self._times: dict[int, TurnTime] = {}
        self._finish_reason: str | None = None
        self._last: tuple[_Sequence, int] | None = None

    async def run(self, begun: Reply, first: Trajectory, replica_id: str) -> None:
        """Play to the end, from the first turn that was sampled with those of the group."""
        reserved = len(first.token_ids)
        self._left -= reserved
        tasks = {asyncio.create_task(self._answer(begun.requests[0], first, replica_id, reserved))}
        self._turns = 1
        cut: str | None = None
        requests = list(begun.requests[1:])
        try:
            while tasks or requests:
                admitted: list[tuple[Request, _Sequence]] = []
                postponed: list[Request] = []
                for request in requests:
                    reason = cut or self._limit(request, num_others=len(admitted))
                    if reason is None:
                        self._turns += 1
                        admitted.append((request, self._observe(request)))
                    elif reason == "length" and cut is None and (tasks or admitted):
                        postponed.append(request)  # Turns that are being sampled may leave tokens.
                    else:
                        cut = reason
                        self._observe(request)
                for place, (request, sequence) in enumerate(admitted):
                    most = self.longest(request, num_shares=len(admitted) - place)
                    self._left -= most  # What is not sampled comes back.
                    tasks.add(asyncio.create_task(self._turn(request, sequence, most)))
                requests = postponed
                if not tasks:
                    break
                done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                replies = [task.result() for task in done]
                requests += [request for reply in replies for request in reply.requests]
        finally:
            await cancel_all(tasks)
        if self._finish_reason is None:
            assert cut is not None, "an episode neither ended nor asked for a turn"
            reply = await self._episode.cut(cut)
            self._finish_reason = cut
            self._add_reward(reply.final_reward)

    def sampling(self, request: Request) -> SamplingSettings:
        """How the tokens of a request are drawn."""
        settings = self._engine.sampling
        return replace(settings, stop=(*settings.stop, *request.stop), tools=request.tools or settings.tools)

    def longest(self, request: Request, *, num_shares: int = 1) -> int:
        """Tokens that the answer to a request may have: at most its share of what is left to the trajectory."""
        limits = (request.max_tokens, self._limits.max_turn_tokens, self._left // num_shares)
        return max(1, min(limit for limit in limits if limit is not None))

    def trajectory(self) -> Trajectory:
        """The whole."""
        assert self._finish_reason is not None
        self._set_followers()
        first, *others = [one for one in self._sequences if one.turns]
        further = tuple(
            FurtherSequence(prompt_token_ids=one.prompt, trajectory=one.trajectory(self._finish_reason))
            for one in others
        )
        return replace(first.trajectory(self._finish_reason), further=further)

    def _limit(self, request: Request, *, num_others: int) -> str | None:
        """Which limit forbids a further turn, if any, where so many others get a token at least."""
        if self._left - num_others < 1:
            return "length"
        if self._turns >= self._limits.max_turns:
            return "turns"
        is_new = request.sequence == len(self._sequences)
        if is_new and len(request.token_ids) > self._limits.max_prompt_tokens:
            longest = self._limits.max_prompt_tokens
            message = f"a rewritten prompt of {len(request.token_ids)} tokens, more than rollouts.max_prompt_tokens"
            raise EpisodeFailed("too_long", f"{self._name}: {message} = {longest}")
        observed = 0 if is_new else len(request.token_ids)
        return "length" if self._left - observed - num_others < 1 else None

    def _observe(self, request: Request) -> _Sequence:
        """Append the observation of a request to its sequence, or begin a new one."""
        if request.sequence == len(self._sequences):
            self._sequences.append(_Sequence(request.token_ids))
        else:
            observed = request.token_ids[: max(0, self._left)]
            self._sequences[request.sequence].observe(observed, request.messages)
            self._left -= len(observed)
        return self._sequences[request.sequence]

    async def _turn(self, request: Request, sequence: _Sequence, most: int) -> Reply:
        prefix = sequence.token_ids
        times = self._prefixes[prefix.tobytes()]
        self._prefixes[prefix.tobytes()] += 1
        engine = replace(
            self._engine,
            sampling=replace(self.sampling(request), group_size=1),
            version=self._newest,
            replica_id=sequence.replica_id or self._sequences[0].replica_id,
        )
        seed = self._seeds.later_turn(self._index, prefix, times)
        group = await engine.sample(replace(self._prompt, token_ids=prefix), seed=seed, max_tokens=most)
        return await self._answer(request, group.trajectories[0], group.replica_id, most)

    async def _answer(self, request: Request, turn: Trajectory, replica_id: str, reserved: int) -> Reply:
        """Record what was sampled and tell the environment."""
        sequence = self._sequences[request.sequence]
        place = sequence.sampled(turn, replica_id, request.number)
        self._left += reserved - len(turn.token_ids)
        self._newest = max([self._newest, *(span.version for span in turn.version_spans)])
        if self._last is None or request.number >= (self._last[0].turns[self._last[1]].number or 0):
            self._last = sequence, place
        sampled = Sampled(
            number=request.number,
            token_ids=turn.token_ids,
            logprobs=turn.sampling_logprobs,
            finish_reason=turn.finish_reason,
            message=turn.turns[0].message,
        )
        known = self._known.get(request.number, 0)
        self._times[request.number] = TurnTime(sequence=request.sequence, known=known, answer=self._num_answers)
        self._num_answers += 1
        reply = await self._episode.step(sampled)
        self._known |= dict.fromkeys((one.number for one in reply.requests), self._num_answers)
        self._engine.requests.stepped(self._name, self._episode.worker, reply.step_s, reply.metrics)
        sequence.turns[place] = replace(sequence.turns[place], reward=reply.reward, message=reply.message)
        if reply.finish_reason is not None:
            cut = turn.finish_reason == "length" and reply.finish_reason == "environment"
            self._finish_reason = "length" if cut else reply.finish_reason
            self._add_reward(reply.final_reward)
        return reply

    def _set_followers(self) -> None:
        """Say which turn comes after which, unless they came one after the other."""
        numbers = sorted(self._times)
        after = followers([self._times[number] for number in numbers])
        if after == [*range(1, len(numbers)), None]:
            return
        places = zip(numbers, after, strict=True)
        follower = {number: number if place is None else numbers[place] for number, place in places}
        for sequence in self._sequences:
            sequence.turns = [replace(turn, follower=follower.get(turn.number or 0)) for turn in sequence.turns]

    def _add_reward(self, reward: float) -> None:
        """Give the last turn what is for the whole episode."""
        if reward:
            assert self._last is not None
            sequence, place = self._last
            turn = sequence.turns[place]
            sequence.turns[place] = replace(turn, reward=turn.reward + reward)


async def _all(*coroutines: Any) -> list[Any]:
    """Gather; where one fails, the others are cancelled before its error is raised."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await cancel_all(tasks)
