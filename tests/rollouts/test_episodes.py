from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rlhf_ray.environments.episode import EpisodeFailed, Reply, Request, Sampled, Start
from rlhf_ray.errors import RolloutError
from rlhf_ray.rollouts.episodes import MultiTurn, TurnLimits
from rlhf_ray.rollouts.rollouter import Engine, Seeds
from rlhf_ray.types import Prompt, RewardFailure, RolloutGroup, SamplingSettings, Trajectory, Turn, VersionSpan

PROMPT = Prompt(prompt_id=7, token_ids=np.asarray([1, 2], dtype=np.int32), text="question", columns={"env": "game"})
SEEDS = Seeds(run_seed=5, version=3, prompt_id=7)
LIMITS = TurnLimits(max_turns=4, max_turn_tokens=None, max_prompt_tokens=16, timeout_s=5.0)


def ids(*tokens: int) -> np.ndarray[Any, Any]:
    return np.asarray(tokens, dtype=np.int32)


class Replicas:
    """What they sample follows from the tokens before, the seed and the length; each turn is of a newer policy."""

    def __init__(self, length: int = 3) -> None:
        self.length = length
        self.version = 3
        self.requests: list[dict[str, Any]] = []

    async def generate(self, prompt: Prompt, sampling: SamplingSettings, **asked: Any) -> RolloutGroup:
        self.requests.append({"ids": prompt.token_ids.tolist(), "sampling": sampling, **asked})
        await asyncio.sleep(0)
        return RolloutGroup(
            group_id=prompt.prompt_id,
            prompt=prompt,
            trajectories=tuple(
                self.completion(prompt, asked["seed"] + i, asked["max_tokens"]) for i in range(sampling.group_size)
            ),
            replica_id=asked["replica_id"] or "r1",
        )

    def completion(self, prompt: Prompt, seed: int, max_tokens: int) -> Trajectory:
        digest = hashlib.sha256(f"{prompt.token_ids.tolist()}/{seed}".encode()).digest()
        length = min(self.length, max_tokens)
        self.version += 1
        return Trajectory(
            token_ids=ids(*(100 + byte for byte in digest[:length])),
            sampling_logprobs=np.asarray([-(1 + byte) / 256 for byte in digest[:length]], dtype=np.float32),
            turns=(Turn(start=0, end=length, message={"role": "assistant", "content": str(digest[0])}),),
            version_spans=(VersionSpan(version=self.version, start=0, end=length),),
            asked_version=self.version - 1,
            finish_reason="length" if length < self.length else "stop",
        )


class Scripted:
    """An episode that plays a script: number of the step -> what comes next."""

    def __init__(self, script: Callable[[int, Sampled], Reply], begin: Reply) -> None:
        self._script = script
        self._begin = begin
        self.sampled: list[Sampled] = []
        self.cuts: list[str] = []
        self.closed = 0
        self.worker = "environment worker 1"

    async def begin(self) -> Reply:
        return self._begin

    async def step(self, sampled: Sampled) -> Reply:
        self.sampled.append(sampled)
        return self._script(len(self.sampled), sampled)

    async def cut(self, reason: str) -> Reply:
        self.cuts.append(reason)
        return Reply(final_reward=0.25)

    def close(self) -> None:
        self.closed += 1


class Pool:
    def __init__(self, script: Callable[[int, Sampled], Reply], begin: Reply | None = None) -> None:
        self._script = script
        self._begin = begin or Reply(requests=(Request(number=0, sequence=0, token_ids=PROMPT.token_ids, text="q"),))
        self.starts: list[Start] = []
        self.episodes: list[Scripted] = []

    def play(self, start: Start) -> Scripted:
        self.starts.append(start)
        self.episodes.append(Scripted(self._script, self._begin))
        return self.episodes[-1]


def again(number: int, *observed: int, sequence: int = 0, **more: Any) -> Request:
    return Request(number=number, sequence=sequence, token_ids=ids(*observed), **more)


def endless(step: int, sampled: Sampled) -> Reply:
    return Reply(requests=(again(step, 9, 9),), reward=step / 8)


def three_turns(step: int, sampled: Sampled) -> Reply:
    if step == 3:
        return Reply(reward=1.0, finish_reason="stop")
    return Reply(requests=(again(step, 50 + step, 60 + step),), reward=0.5)


def roll_out(
    pool: Pool,
    replicas: Replicas | None = None,
    *,
    limits: TurnLimits = LIMITS,
    group_size: int = 2,
    max_new_tokens: int = 64,
    names: Sequence[str] = ("game",),
    column: str | None = None,
    seeds: Seeds = SEEDS,
    prompt: Prompt = PROMPT,
) -> RolloutGroup | RewardFailure:
    sampling = SamplingSettings(group_size=group_size, max_new_tokens=max_new_tokens, temperature=1.0)
    engine = Engine(
        generate=(replicas or Replicas()).generate, sampling=sampling, version=3, max_retries=0, timeout_s=5.0
    )
    rollouter = MultiTurn(pool, limits, names=names, column=column)  # type: ignore[arg-type]
    return asyncio.run(rollouter.rollout(prompt, engine, seeds))


def group_of(pool: Pool, replicas: Replicas | None = None, **arguments: Any) -> RolloutGroup:
    group = roll_out(pool, replicas, **arguments)
    assert isinstance(group, RolloutGroup)
    return group


def failure_of(pool: Pool, **arguments: Any) -> RewardFailure:
    failure = roll_out(pool, **arguments)
    assert isinstance(failure, RewardFailure)
    assert all(episode.closed for episode in pool.episodes)
    return failure


def test_every_turn_is_asked_with_exactly_what_was_before() -> None:
    pool, replicas = Pool(three_turns), Replicas()
    group = group_of(pool, replicas)

    assert group.environment == "game"
    for trajectory in group.trajectories:
        whole = PROMPT.token_ids.tolist() + trajectory.token_ids.tolist()
        for turn in trajectory.turns:
            prefix = whole[: len(PROMPT.token_ids) + turn.start]
            assert prefix in [request["ids"] for request in replicas.requests]
        assert [(turn.start, turn.end, turn.reward) for turn in trajectory.turns] == [
            (0, 3, 0.5),
            (5, 8, 0.5),
            (10, 13, 1.0),
        ]
        assert trajectory.token_ids[3:5].tolist() == [51, 61]
        assert trajectory.token_ids[8:10].tolist() == [52, 62]
        observed = ~trajectory.loss_mask
        assert observed.sum() == 4
        assert (trajectory.sampling_logprobs[observed] == 0).all()
        assert (trajectory.sampling_logprobs[~observed] < 0).all()
        assert trajectory.finish_reason == "stop"
        assert not trajectory.truncated


def test_the_first_turn_of_a_group_is_one_request() -> None:
    replicas = Replicas()
    group_of(Pool(three_turns), replicas, group_size=3)
    assert [request["sampling"].group_size for request in replicas.requests] == [3, 1, 1, 1, 1, 1, 1]
    assert replicas.requests[0]["seed"] == SEEDS.first_turn


def test_later_turns_stick_to_the_replica_and_never_to_older_weights() -> None:
    replicas = Replicas()
    group = group_of(Pool(three_turns), replicas, group_size=1)
    assert [request["replica_id"] for request in replicas.requests] == ["", "r1", "r1"]
    versions = [span.version for span in group.trajectories[0].version_spans]
    assert versions == sorted(versions)
    assert [request["min_version"] for request in replicas.requests] == [3, *versions[:-1]]
    assert [(span.start, span.end) for span in group.trajectories[0].version_spans] == [(0, 3), (5, 8), (10, 13)]


def test_a_rollout_is_the_same_when_it_is_made_again() -> None:
    first, second = (group_of(Pool(three_turns)) for _ in range(2))
    for one, other in zip(first.trajectories, second.trajectories, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
    seeds = Seeds(run_seed=6, version=3, prompt_id=7)
    third = group_of(Pool(three_turns), seeds=seeds)
    assert third.trajectories[0].token_ids.tolist() != first.trajectories[0].token_ids.tolist()


def test_episodes_of_a_group_have_one_seed_and_that_of_the_prompt() -> None:
    pool = Pool(three_turns)
    group_of(pool, group_size=3)
    assert len({start.seed for start in pool.starts}) == 1
    other = Pool(three_turns)
    group_of(other, seeds=Seeds(run_seed=5, version=9, prompt_id=7))
    assert other.starts[0].seed == pool.starts[0].seed, "a later policy plays the same game"
    group_of(another := Pool(three_turns), seeds=Seeds(run_seed=5, version=3, prompt_id=8))
    assert another.starts[0].seed != pool.starts[0].seed


def test_no_more_turns_than_allowed_and_the_last_observation_is_kept() -> None:
    pool, replicas = Pool(endless), Replicas()
    (trajectory,) = group_of(pool, replicas, group_size=1).trajectories
    assert len(trajectory.turns) == LIMITS.max_turns
    assert len(replicas.requests) == LIMITS.max_turns
    assert trajectory.finish_reason == "turns"
    assert trajectory.truncated
    assert pool.episodes[0].cuts == ["turns"]
    assert trajectory.token_ids[-2:].tolist() == [9, 9], "what the critic bootstraps from follows the last turn"
    assert trajectory.turns[-1].reward == LIMITS.max_turns / 8 + 0.25, "what the cut gave belongs to the last turn"


@pytest.mark.parametrize("max_new_tokens", range(1, 20))
def test_a_trajectory_is_never_longer_than_allowed(max_new_tokens: int) -> None:
    pool, replicas = Pool(endless), Replicas()
    (trajectory,) = group_of(pool, replicas, group_size=1, max_new_tokens=max_new_tokens).trajectories
    assert len(trajectory.token_ids) <= max_new_tokens
    assert all(request["max_tokens"] >= 1 for request in replicas.requests)
    whole_turns = max_new_tokens >= 4 * 3 + 3 * 2 + 1
    assert trajectory.finish_reason == ("turns" if whole_turns else "length")
    assert (
        pool.episodes[0].sampled[-1].token_ids.tolist()
        == trajectory.token_ids[trajectory.turns[-1].start : trajectory.turns[-1].end].tolist()
    ), "the environment sees the turn that was cut, too"


def test_turns_have_a_limit_of_their_own() -> None:
    limits = TurnLimits(max_turns=4, max_turn_tokens=2, max_prompt_tokens=16, timeout_s=5.0)
    pool, replicas = Pool(three_turns), Replicas()
    (trajectory,) = group_of(pool, replicas, limits=limits, group_size=1).trajectories
    assert [turn.end - turn.start for turn in trajectory.turns] == [2, 2, 2]
    assert {sampled.finish_reason for sampled in pool.episodes[0].sampled} == {"length"}
    assert trajectory.finish_reason == "stop", "the environment was done"


def test_a_request_may_ask_for_less() -> None:
    def script(step: int, sampled: Sampled) -> Reply:
        if step == 2:
            return Reply(finish_reason="stop")
        return Reply(requests=(again(1, 9, max_tokens=1, stop=("x",), tools="[]"),))

    replicas = Replicas()
    group_of(Pool(script), replicas, group_size=1)
    assert [request["max_tokens"] for request in replicas.requests] == [64, 1]
    assert replicas.requests[1]["sampling"].stop == ("x",)
    assert replicas.requests[1]["sampling"].tools == "[]"


def test_a_limit_of_the_environment_truncates() -> None:
    pool = Pool(lambda step, sampled: Reply(finish_reason="environment"))
    assert group_of(pool).trajectories[0].finish_reason == "environment"
    assert group_of(pool, max_new_tokens=2).trajectories[0].finish_reason == "length", "it was cut before"


def test_rewritten_history_is_a_further_sequence() -> None:
    def script(step: int, sampled: Sampled) -> Reply:
        if step == 3:
            return Reply(finish_reason="stop", final_reward=2.0)
        if step == 1:
            return Reply(requests=(again(1, 9),))
        return Reply(requests=(again(2, 1, 8, 8, sequence=1),), reward=0.5)

    replicas = Replicas()
    (trajectory,) = group_of(Pool(script), replicas, group_size=1).trajectories
    assert len(trajectory.turns) == 2
    (further,) = trajectory.further
    assert further.prompt_token_ids.tolist() == [1, 8, 8]
    assert replicas.requests[2]["ids"] == [1, 8, 8]
    assert [turn.reward for turn in further.trajectory.turns] == [2.0]
    assert trajectory.environment_reward == 2.5
    assert [len(sequence.turns) for sequence in trajectory.sequences] == [2, 1]


def test_parallel_requests_are_sampled_together_and_apart() -> None:
    def script(step: int, sampled: Sampled) -> Reply:
        if step == 1:
            forks = (again(1, 4, 4, sequence=1), again(2, 4, 4, sequence=2), again(3, 9))
            return Reply(requests=forks)
        return Reply() if step < 4 else Reply(finish_reason="stop", final_reward=1.0)

    replicas = Replicas()
    (trajectory,) = group_of(Pool(script), replicas, group_size=1).trajectories
    assert [request["ids"][:2] for request in replicas.requests[1:3]] == [[4, 4], [4, 4]]
    assert len({request["seed"] for request in replicas.requests}) == 4, "equal prompts are sampled apart"
    assert [len(sequence.turns) for sequence in trajectory.sequences] == [2, 1, 1]
    assert trajectory.environment_reward == 1.0


def test_turns_in_parallel_say_what_comes_after_them() -> None:
    """Two helpers, who take another turn each, while the first conversation waits for both."""

    def script(step: int, sampled: Sampled) -> Reply:
        replies = {
            0: (again(1, 4, sequence=1), again(2, 5, sequence=2)),
            1: (again(3, 6, sequence=1),),
            2: (again(4, 6, sequence=2),),
        }
        if sampled.number == 5:
            return Reply(finish_reason="stop", final_reward=1.0)
        return Reply(requests=replies.get(sampled.number, (again(5, 9),) if step == 5 else ()))

    (trajectory,) = group_of(Pool(script), group_size=1, limits=replace(LIMITS, max_turns=8)).trajectories
    assert {turn.number: turn.follower for turn in trajectory.all_turns} == {0: 1, 1: 3, 2: 4, 3: 5, 4: 5, 5: 5}
    assert [turn.number for turn in trajectory.turns] == [0, 5]
    assert trajectory.turns[1].reward == 1.0


def test_turns_one_after_the_other_have_no_followers_to_tell() -> None:
    trajectories = group_of(Pool(three_turns)).trajectories
    assert {turn.follower for each in trajectories for turn in each.turns} == {None}


def test_parallel_requests_share_what_is_left() -> None:
    def script(step: int, sampled: Sampled) -> Reply:
        if step == 1:
            return Reply(requests=tuple(again(n, 4, sequence=n) for n in (1, 2, 3)))
        return Reply() if step < 4 else Reply(finish_reason="stop")

    replicas = Replicas()
    (trajectory,) = group_of(Pool(script), replicas, group_size=1, max_new_tokens=30).trajectories
    first = trajectory.turns[0].end
    left = 30 - first
    shares = [request["max_tokens"] for request in replicas.requests[1:]]
    assert sum(shares) == left
    assert max(shares) - min(shares) <= 1
    assert not trajectory.truncated


def test_a_request_waits_for_what_others_leave() -> None:
    """The second asks while the first holds all that is left, and gets what that one does not need."""
    asked = asyncio.Event()

    class Slow(Replicas):
        async def generate(self, prompt: Prompt, sampling: Any, **more: Any) -> Any:
            if prompt.token_ids.tolist()[:1] == [4]:
                await asyncio.wait_for(asked.wait(), 5)
            return await super().generate(prompt, sampling, **more)

    def script(step: int, sampled: Sampled) -> Reply:
        if step == 1:
            return Reply(requests=(again(2, 5, sequence=1, max_tokens=1), again(1, 4, sequence=2)))
        if sampled.number == 2:
            asked.set()
            return Reply(requests=(again(3, 6, sequence=3),))
        return Reply() if step < 4 else Reply(finish_reason="stop")

    replicas = Slow()
    (trajectory,) = group_of(Pool(script), replicas, group_size=1, max_new_tokens=12).trajectories
    assert [len(sequence.turns) for sequence in trajectory.sequences] == [1, 1, 1, 1]
    assert sum(len(sequence.token_ids) for sequence in trajectory.sequences) <= 12
    # 12 less the first turn's 3; of the others' 1 and 8, 3 of the latter are sampled.
    assert [request["max_tokens"] for request in replicas.requests] == [12, 1, 8, 5]
    assert trajectory.finish_reason == "stop"


def test_seeds_of_parallel_requests_do_not_follow_their_order() -> None:
    def seeds_by_prompt(order: tuple[int, ...]) -> dict[tuple[int, ...], int]:
        def script(step: int, sampled: Sampled) -> Reply:
            if step == 1:
                forks = tuple(again(n, token, sequence=n) for n, token in enumerate(order, 1))
                return Reply(requests=forks)
            return Reply() if step < 3 else Reply(finish_reason="stop")

        replicas = Replicas()
        group_of(Pool(script), replicas, group_size=1)
        return {tuple(request["ids"]): request["seed"] for request in replicas.requests}

    assert seeds_by_prompt((4, 5)) == seeds_by_prompt((5, 4))


@pytest.mark.parametrize("when", ["begin", "step"])
def test_a_failed_episode_is_the_failure_of_its_group(when: str) -> None:
    def fail(step: int, sampled: Sampled) -> Reply:
        raise EpisodeFailed("raised", "game: step raised ValueError")

    pool = Pool(fail)
    if when == "begin":

        async def begin(self: Scripted) -> Reply:
            raise EpisodeFailed("raised", "game: step raised ValueError")

        pool.play = lambda start: _with(pool, start, begin)  # type: ignore[method-assign]
    failure = failure_of(pool)
    assert (failure.kind, failure.environment, failure.group_id) == ("raised", "game", 7)
    assert "ValueError" in failure.message


def _with(pool: Pool, start: Start, begin: Any) -> Scripted:
    episode = Scripted(pool._script, pool._begin)
    episode.begin = begin.__get__(episode)  # type: ignore[method-assign]
    pool.episodes.append(episode)
    return episode


def test_unequal_prompts_of_a_group_are_refused() -> None:
    pool = Pool(three_turns)
    play = pool.play

    def unequal(start: Start) -> Scripted:
        pool._begin = Reply(requests=(again(0, 1, len(pool.episodes)),))
        return play(start)

    pool.play = unequal  # type: ignore[method-assign]
    failure = failure_of(pool)
    assert failure.kind == "not_seeded"
    assert "follow from seed" in failure.message


def test_prompts_that_do_not_fit_are_failures() -> None:
    long = Pool(three_turns, Reply(requests=(again(0, *range(17)),)))
    assert failure_of(long).kind == "too_long"
    rewritten = Pool(lambda step, sampled: Reply(requests=(again(1, *range(17), sequence=1),)))
    failure = failure_of(rewritten)
    assert failure.kind == "too_long"
    assert "max_prompt_tokens = 16" in failure.message


def test_an_episode_has_a_time_limit() -> None:
    class Slow(Scripted):
        async def step(self, sampled: Sampled) -> Reply:
            await asyncio.sleep(60)
            raise AssertionError

    pool = Pool(three_turns)
    pool.play = lambda start: pool.episodes.append(Slow(three_turns, pool._begin)) or pool.episodes[-1]  # type: ignore[func-returns-value,method-assign]
    limits = TurnLimits(max_turns=4, max_turn_tokens=None, max_prompt_tokens=16, timeout_s=0.05)
    failure = failure_of(pool, limits=limits)
    assert failure.kind == "timeout"
    assert "environment.timeout_s = 0.05 s" in failure.message


def test_what_replicas_raise_ends_the_run_and_closes_episodes() -> None:
    class Refusing(Replicas):
        async def generate(self, prompt: Prompt, sampling: SamplingSettings, **asked: Any) -> RolloutGroup:
            if len(self.requests) == 2:
                raise RolloutError("no such token")
            return await super().generate(prompt, sampling, **asked)

    pool = Pool(three_turns)
    with pytest.raises(RolloutError, match="no such token"):
        roll_out(pool, Refusing())
    assert all(episode.closed for episode in pool.episodes)


def test_rows_choose_their_environment() -> None:
    pool = Pool(three_turns)
    group = group_of(pool, names=("shop", "game"), column="env")
    assert group.environment == pool.starts[0].environment == "game"
    failure = failure_of(Pool(three_turns), names=("shop", "walk"), column="env")
    assert "names 'game'; there are shop, walk" in failure.message


def test_the_prompt_of_the_group_is_that_of_the_environment() -> None:
    begun = Reply(
        requests=(Request(number=0, sequence=0, token_ids=ids(4, 5, 6), messages=({"role": "user", "content": "go"},)),)
    )
    group = group_of(Pool(three_turns, begun))
    assert group.prompt.token_ids.tolist() == [4, 5, 6]
    assert group.prompt.text == [{"role": "user", "content": "go"}]
    assert group.prompt.columns == PROMPT.columns


def test_messages_and_observations_are_kept_for_reports() -> None:
    def script(step: int, sampled: Sampled) -> Reply:
        assert sampled.message is not None, "as the engine's parsers read it"
        message = {"role": "assistant", "content": f"turn {step}"}
        if step == 2:
            return Reply(message=message, finish_reason="stop")
        return Reply(message=message, requests=(again(1, 9, messages=({"role": "tool", "content": "9"},)),))

    (trajectory,) = group_of(Pool(script), group_size=1).trajectories
    assert [turn.message for turn in trajectory.turns] == [
        {"role": "assistant", "content": "turn 1"},
        {"role": "assistant", "content": "turn 2"},
    ]
    assert trajectory.turns[0].observation == ({"role": "tool", "content": "9"},)
