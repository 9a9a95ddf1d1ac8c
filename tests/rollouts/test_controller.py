from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError

from rlhf_ray.errors import DataError, RewardError, RolloutError
from rlhf_ray.rollouts import controller as thread_module
from rlhf_ray.rollouts import rollouter as module
from rlhf_ray.rollouts.admission import FlowRules
from rlhf_ray.rollouts.controller import RolloutController
from rlhf_ray.rollouts.flow import RolloutFlow
from rlhf_ray.rollouts.rollouter import Engine, Seeds, SingleTurn, group_seed
from rlhf_ray.types import (
    Prompt,
    PromptPosition,
    RewardFailure,
    RolloutGroup,
    SamplingSettings,
    ScoredGroup,
    Trajectory,
    VersionSpan,
)

SAMPLING = SamplingSettings(group_size=2, max_new_tokens=4, temperature=1.0)
GREEDY = SamplingSettings(group_size=1, max_new_tokens=4, temperature=0.0)
FOREVER_S = 60.0


def prompt(number: int) -> Prompt:
    return Prompt(
        prompt_id=number,
        token_ids=np.asarray([number], dtype=np.int32),
        text=f"question {number}",
        columns={"answer": number * 10},
    )


def endless(start: int = 0) -> Iterator[Prompt]:
    return map(prompt, itertools.count(start))


class Replicas:
    """Answers like the Serve handle; remembers what it was asked and what is running.

    Args:
        delays_s: Prompt id -> seconds that its group takes; others take one turn of the loop.
        errors: Prompt id -> exceptions of its first attempts, in order.
    """

    def __init__(
        self, delays_s: dict[int, float] | None = None, errors: dict[int, list[BaseException]] | None = None
    ) -> None:
        self._delays_s = delays_s or {}
        self._errors = errors or {}
        self.calls: list[tuple[Prompt, SamplingSettings, int, int]] = []
        self.running = 0
        self.most_running = 0
        self.cancelled: list[int] = []

    async def generate(
        self, prompt: Prompt, sampling: SamplingSettings, *, seed: int, min_version: int, **_: Any
    ) -> RolloutGroup:
        self.calls.append((prompt, sampling, seed, min_version))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(self._delays_s.get(prompt.prompt_id, 0.0))
            if self._errors.get(prompt.prompt_id):
                raise self._errors[prompt.prompt_id].pop(0)
            return written(prompt, sampling)
        except asyncio.CancelledError:
            self.cancelled.append(prompt.prompt_id)
            raise
        finally:
            self.running -= 1

    def asked(self) -> list[int]:
        return [prompt.prompt_id for prompt, *_ in self.calls]


def written(prompt: Prompt, sampling: SamplingSettings) -> RolloutGroup:
    completion = Trajectory.single_turn(
        token_ids=np.asarray([1], dtype=np.int32),
        sampling_logprobs=np.zeros(1, dtype=np.float32),
        asked_version=0,
        version_spans=(VersionSpan(version=0, start=0, end=1),),
        finish_reason="stop",
    )
    completions = (completion,) * sampling.group_size
    return RolloutGroup(group_id=prompt.prompt_id, prompt=prompt, trajectories=completions, replica_id="r")


class Rewards:
    """Scores a group with its answer; fails the prompts that it is told to."""

    def __init__(self, failing: Iterable[int] = (), delay_s: float = 0.0) -> None:
        self._failing = set(failing)
        self._delay_s = delay_s
        self.scored: list[RolloutGroup] = []

    def failed(self) -> set[int]:
        return {group.group_id for group in self.scored if group.group_id in self._failing}

    async def score(self, group: RolloutGroup) -> ScoredGroup | RewardFailure:
        await asyncio.sleep(self._delay_s)
        self.scored.append(group)
        if group.group_id in self._failing:
            kind = "raised" if group.group_id % 2 else "timeout"
            return RewardFailure(group_id=group.group_id, kind=kind, message=f"bad answer {group.group_id}")
        rewards = np.full(len(group.trajectories), group.prompt.columns["answer"], dtype=np.float32)
        return ScoredGroup(group=group, rewards=rewards, rewards_by_function={}, texts=(), reward_s=0.0)


@pytest.fixture
def make() -> Iterator[Callable[..., RolloutController]]:
    """Build controllers that are stopped at the end."""
    started: list[RolloutController] = []

    def build(replicas: Replicas, rewards: Rewards | None = None, **overrides: Any) -> RolloutController:
        while_waiting = overrides.pop("while_waiting", lambda: None)
        prompts = overrides.pop("prompts", endless())
        engine = Engine(
            generate=replicas.generate,
            sampling=overrides.pop("sampling", SAMPLING),
            max_retries=overrides.pop("max_retries", 2),
            timeout_s=overrides.pop("timeout_s", 10.0),
        )
        rules: dict[str, Any] = {
            "batch_size": 4,
            "max_staleness": 0,
            "max_concurrent": 4,
            "max_failures": 4,
            "max_equal_groups": None,
            "partial_rollouts": False,
            "greedy_baseline": False,
            "stall_timeout_s": 10.0,
            "seed": 5,
        }
        flow = RolloutFlow(
            rollouter=overrides.pop("rollouter", SingleTurn()),
            engine=engine,
            scorer=rewards or Rewards(),
            prompts=prompts,
            rules=FlowRules(**rules | overrides),
        )
        started.append(RolloutController(flow, while_waiting=while_waiting))
        return started[-1]

    yield build
    for controller in started:
        controller.stop()


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RETRY_PAUSE_S", 0.001)


def ids(groups: Iterable[ScoredGroup | RewardFailure]) -> list[int]:
    return [outcome.group.group_id if isinstance(outcome, ScoredGroup) else -1 for outcome in groups]


# Collecting a batch.


def test_groups_come_in_the_order_of_their_prompts(make: Callable[..., RolloutController]) -> None:
    replicas = Replicas(delays_s={0: 0.05, 1: 0.03, 2: 0.01})

    collected = make(replicas).collect(0)

    assert ids(collected.groups) == [0, 1, 2, 3]
    assert collected.failures == Counter()


def test_each_version_gets_the_next_prompts_and_no_more(make: Callable[..., RolloutController]) -> None:
    replicas = Replicas()
    controller = make(replicas, max_concurrent=16)

    assert [ids(controller.collect(version).groups) for version in range(3)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]
    assert len(replicas.calls) == 12


def test_no_more_than_max_concurrent_run_at_once(make: Callable[..., RolloutController]) -> None:
    replicas = Replicas()

    make(replicas, batch_size=20, max_concurrent=3).collect(0)

    assert replicas.most_running == 3
    assert len(replicas.calls) == 20


def test_seeds_and_versions_of_requests(make: Callable[..., RolloutController]) -> None:
    replicas = Replicas()
    controller = make(replicas, seed=5)
    controller.collect(0)
    controller.collect(1)

    wanted = [(number, group_seed(5, number // 4, number), number // 4) for number in range(8)]
    assert [(p.prompt_id, seed, version) for p, _, seed, version in replicas.calls] == wanted
    assert all(sampling == SAMPLING for _, sampling, _, _ in replicas.calls)


def test_replicas_do_not_carry_the_rows_columns_and_rewards_get_them_back(
    make: Callable[..., RolloutController],
) -> None:
    replicas, rewards = Replicas(), Rewards()

    collected = make(replicas, rewards).collect(0)

    assert all((p.columns, p.text) == ({}, "") for p, *_ in replicas.calls)
    assert [p.token_ids.tolist() for p, *_ in replicas.calls] == [[0], [1], [2], [3]]
    for scored in collected.groups:
        number = scored.group.group_id
        assert scored.group.prompt.columns == {"answer": number * 10}
        assert scored.group.prompt.text == f"question {number}"
        assert scored.rewards.tolist() == [number * 10.0] * 2


def test_times_of_rollouts_and_of_what_rewards_add(make: Callable[..., RolloutController]) -> None:
    collected = make(Replicas(delays_s={2: 0.05}), Rewards(delay_s=0.1)).collect(0)

    assert collected.rollout_s >= 0.05
    assert collected.reward_s >= 0.09


def test_a_restored_run_starts_with_its_own_versions_room(make: Callable[..., RolloutController]) -> None:
    replicas = Replicas()
    controller = make(replicas, prompts=endless(20), max_concurrent=16)
    controller.resume(5)

    assert ids(controller.collect(5).groups) == [20, 21, 22, 23]
    assert len(replicas.calls) == 4, "the room of versions 0 to 4 is used up"


# Failed rewards.


def test_failed_groups_are_replaced_and_counted(make: Callable[..., RolloutController]) -> None:
    controller = make(Replicas(), Rewards(failing=[1, 2, 5]))

    collected = controller.collect(0)

    assert len(collected.groups) == 4
    assert not {1, 2, 5} & set(ids(collected.groups))
    assert collected.failures == Counter(raised=2, timeout=1)
    again = controller.collect(1)
    assert len(again.groups) == 4
    assert again.failures == Counter(), "each batch has its own count"


def test_too_many_failures_end_the_run_and_say_why(make: Callable[..., RolloutController]) -> None:
    replicas = Replicas(delays_s={6: FOREVER_S})
    controller = make(replicas, Rewards(failing=range(100)), max_failures=2, max_concurrent=1)

    with pytest.raises(RewardError, match=r"rewards\.max_failures = 2") as caught:
        controller.collect(0)

    assert "1 raised" in str(caught.value)
    assert "2 timeout" in str(caught.value)
    assert "bad answer 2" in str(caught.value)
    assert replicas.asked() == [0, 1, 2], "the third failure is one too many"


def test_as_many_failures_as_allowed_are_survived(make: Callable[..., RolloutController]) -> None:
    collected = make(Replicas(), Rewards(failing=[0, 1]), max_failures=2).collect(0)

    assert collected.failures.total() == 2
    assert len(collected.groups) == 4


def test_each_failure_is_logged_with_its_message(
    make: Callable[..., RolloutController], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="rlhf_ray"):
        make(Replicas(), Rewards(failing=[1])).collect(0)

    assert any("bad answer 1" in record.getMessage() for record in caplog.records)


def test_failures_of_a_kind_are_counted_and_not_repeated_in_the_log(
    make: Callable[..., RolloutController], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="rlhf_ray"):
        collected = make(Replicas(), Rewards(failing=[1, 2, 3])).collect(0)
    assert collected.failures.total() == 3
    dropped = [record for record in caplog.records if "is dropped, its reward failed" in record.getMessage()]
    assert len(dropped) == len(collected.failures)


# Replicas that fail.


@pytest.mark.usefixtures("no_pause")
@pytest.mark.parametrize("error", [RayActorError(), ActorDiedError()])
def test_a_group_is_sent_again_with_the_same_seed_when_its_replica_died(
    error: BaseException, make: Callable[..., RolloutController]
) -> None:
    replicas = Replicas(errors={1: [error, error]})
    controller = make(replicas)

    collected = controller.collect(0)

    assert ids(collected.groups) == [0, 1, 2, 3]
    assert controller.retries == 2
    assert len({seed for p, _, seed, _ in replicas.calls if p.prompt_id == 1}) == 1
    controller.collect(1)
    assert controller.retries == 2, "a count of the whole run"


@pytest.mark.usefixtures("no_pause")
def test_a_group_that_fails_at_every_try_ends_the_run(make: Callable[..., RolloutController]) -> None:
    error = RayActorError()
    replicas = Replicas(errors={1: [error] * 3}, delays_s={0: FOREVER_S})

    with pytest.raises(RolloutError, match="prompt 1 failed 3 times") as caught:
        make(replicas, max_retries=2).collect(0)

    assert caught.value.__cause__ is error
    assert replicas.asked().count(1) == 3


def test_a_replica_is_given_time_to_come_back(
    make: Callable[..., RolloutController], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RETRY_PAUSE_S", 0.1)
    started = time.perf_counter()

    make(Replicas(errors={0: [RayActorError()]})).collect(0)

    assert time.perf_counter() - started >= 0.1


def test_a_defect_is_not_tried_again(make: Callable[..., RolloutController]) -> None:
    replicas = Replicas(errors={1: [ValueError("a bug")]})

    with pytest.raises(ValueError, match="a bug"):
        make(replicas).collect(0)

    assert replicas.asked().count(1) == 1


def test_what_the_engine_refuses_is_not_tried_again(make: Callable[..., RolloutController]) -> None:
    refusal = RayTaskError("generate", "traceback", RolloutError("the engine refuses prompt 1: too hot"))
    replicas = Replicas(errors={1: [refusal]})

    with pytest.raises(RolloutError, match="refuses prompt 1: too hot"):
        make(replicas).collect(0)

    assert replicas.asked().count(1) == 1


def test_a_group_that_takes_too_long_names_the_setting(make: Callable[..., RolloutController]) -> None:
    replicas = Replicas(delays_s={3: FOREVER_S})

    with pytest.raises(RolloutError, match=r"prompt 3 .* rollouts\.timeout_s = 0\.05 s"):
        make(replicas, timeout_s=0.05).collect(0)


# Nothing is left running.


@pytest.mark.parametrize(
    ("replicas", "rewards", "error"),
    [
        (Replicas(delays_s={0: FOREVER_S, 2: FOREVER_S}, errors={1: [ValueError("bug")]}), Rewards(), ValueError),
        (Replicas(delays_s={0: FOREVER_S, 2: FOREVER_S}), Rewards(failing=[1, 3]), RewardError),
    ],
    ids=["generation", "reward"],
)
def test_an_error_cancels_what_is_in_flight(
    replicas: Replicas, rewards: Rewards, error: type[Exception], make: Callable[..., RolloutController]
) -> None:
    controller = make(replicas, rewards, max_failures=0)

    with pytest.raises(error):
        controller.collect(0)

    assert replicas.running == 0
    assert set(replicas.cancelled) == {0, 2}


def test_prompts_that_fail_leave_nothing_in_flight(make: Callable[..., RolloutController]) -> None:
    def torn() -> Iterator[Prompt]:
        yield from (prompt(0), prompt(1))
        raise DataError("the third row is torn")

    replicas = Replicas(delays_s={0: FOREVER_S, 1: FOREVER_S})
    controller = make(replicas, prompts=torn())

    with pytest.raises(DataError, match="torn"):
        controller.collect(0)

    time.sleep(0.02)
    assert replicas.running == 0


def test_of_several_errors_at_once_the_others_are_not_complained_about(
    make: Callable[..., RolloutController], caplog: pytest.LogCaptureFixture
) -> None:
    replicas = Replicas(errors={number: [ValueError("bug")] for number in range(4)})

    with pytest.raises(ValueError, match="bug"):
        make(replicas).collect(0)

    gc.collect()
    assert "never retrieved" not in caplog.text


def test_stop_cancels_what_is_in_flight_and_may_be_called_again(make: Callable[..., RolloutController]) -> None:
    replicas = Replicas(delays_s=dict.fromkeys(range(4), FOREVER_S))
    controller = make(replicas)
    with ThreadPoolExecutor(1) as pool:
        collecting = pool.submit(controller.collect, 0)
        while len(replicas.calls) < 4:
            time.sleep(0.005)
        controller.stop()
        with pytest.raises(CancelledError):
            collecting.result(timeout=5.0)

    assert replicas.running == 0
    assert "rollout-controller" not in {thread.name for thread in threading.enumerate()}
    controller.stop()


@pytest.mark.parametrize("evaluates", [False, True])
def test_a_wait_for_completions_is_ended_by_what_is_called_meanwhile(
    make: Callable[..., RolloutController], evaluates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thread_module, "_CHECK_S", 0.01)
    calls: list[int] = []

    def attend() -> None:
        calls.append(threading.get_ident())
        if len(calls) == 3:
            raise KeyError("no state")

    replicas = Replicas(delays_s=dict.fromkeys(range(4), FOREVER_S))
    controller = make(replicas, while_waiting=attend)

    with pytest.raises(KeyError, match="no state"):
        if evaluates:
            controller.score_prompts([prompt(0)], GREEDY, 0)
        else:
            controller.collect(0)

    assert calls == [threading.get_ident()] * 3
    controller.resume(1)
    assert replicas.running == 0


# Evaluation.


def test_scored_prompts_keep_their_order_and_failures_their_place(make: Callable[..., RolloutController]) -> None:
    replicas = Replicas(delays_s={30: 0.05, 31: 0.02})
    controller = make(replicas, Rewards(failing=[31]), max_failures=0)

    outcomes = controller.score_prompts([prompt(30), prompt(31), prompt(32)], GREEDY, 0)

    assert ids(outcomes) == [30, -1, 32]
    assert isinstance(outcomes[1], RewardFailure)
    assert all(sampling == GREEDY for _, sampling, _, _ in replicas.calls)


def test_scored_prompts_may_repeat_and_may_be_none(make: Callable[..., RolloutController]) -> None:
    controller = make(Replicas())

    assert ids(controller.score_prompts([prompt(3)] * 5, GREEDY, 0)) == [3] * 5
    assert controller.score_prompts([], GREEDY, 0) == ()


def test_scored_prompts_count_for_no_update(make: Callable[..., RolloutController]) -> None:
    controller = make(Replicas())

    controller.score_prompts([prompt(90), prompt(91)], GREEDY, 0)

    assert ids(controller.collect(0).groups) == [0, 1, 2, 3]


def test_scored_prompts_fill_the_pool_and_not_more(make: Callable[..., RolloutController]) -> None:
    replicas = Replicas()

    # Training runs 3 groups of 2 at once, so evaluation runs 6 single completions.
    make(replicas, max_concurrent=3).score_prompts([prompt(n) for n in range(40)], GREEDY, 0)

    assert replicas.most_running == 6


@pytest.mark.parametrize(("samples", "groups"), [(2, 3), (4, 1), (16, 1)])
def test_scored_prompts_of_many_samples_fill_the_pool_alike(
    make: Callable[..., RolloutController], samples: int, groups: int
) -> None:
    replicas = Replicas()
    sampling = replace(SAMPLING, group_size=samples)

    make(replicas, max_concurrent=3).score_prompts([prompt(n) for n in range(40)], sampling, 0)

    assert replicas.most_running == groups


def test_an_error_cancels_the_other_scored_prompts(make: Callable[..., RolloutController]) -> None:
    replicas = Replicas(delays_s={0: FOREVER_S}, errors={1: [ValueError("bug")]})

    with pytest.raises(ValueError, match="bug"):
        make(replicas).score_prompts([prompt(0), prompt(1)], GREEDY, 0)

    assert replicas.running == 0
    assert replicas.cancelled == [0]


# Dynamic sampling.


class Verdicts(Rewards):
    """Scores a group 0, 1, ... but those of ``equal``, whose completions all get 1; greedy ones get id + 0.5."""

    def __init__(
        self, equal: Iterable[int] = (), failing: Iterable[int] = (), failing_greedy: Iterable[int] = ()
    ) -> None:
        super().__init__(failing)
        self._equal = set(equal)
        self._failing_greedy = set(failing_greedy)

    async def score(self, group: RolloutGroup) -> ScoredGroup | RewardFailure:
        size = len(group.trajectories)
        if size == 1 and group.group_id in self._failing_greedy:
            return RewardFailure(group_id=group.group_id, kind="raised", message=f"bad greedy answer {group.group_id}")
        scored = await super().score(group)
        if isinstance(scored, RewardFailure):
            return scored
        rewards = np.ones(size) if group.group_id in self._equal else np.arange(size)
        if size == 1:
            rewards = np.asarray([group.group_id + 0.5])
        return replace(scored, rewards=rewards.astype(np.float32))


# The order in which groups of a batch finish: as asked, reversed, and shuffled.
@pytest.mark.parametrize("delays_s", [{}, {n: 0.04 - 0.005 * n for n in range(8)}, {0: 0.03, 3: 0.01, 4: 0.04, 6: 0.0}])
@pytest.mark.parametrize("max_concurrent", [1, 3, 4, 16])
def test_groups_of_equal_rewards_are_replaced_by_the_next_prompts(
    delays_s: dict[int, float], max_concurrent: int, make: Callable[..., RolloutController]
) -> None:
    replicas = Replicas(delays_s=delays_s)
    controller = make(replicas, Verdicts(equal=[0, 2, 3, 5, 9]), max_equal_groups=100, max_concurrent=max_concurrent)

    first, second = controller.collect(0), controller.collect(1)

    assert ids(first.groups) == [1, 4, 6, 7], "the first four that differ, in whatever order they end"
    assert first.equal_reward_groups == 4
    assert first.failures == Counter()
    assert ids(second.groups) == [8, 10, 11, 12]
    assert second.equal_reward_groups == 1, "each batch has its own count"
    assert sorted(replicas.asked()) == list(range(13)), "no prompt is skipped, none is asked twice"


def test_without_dynamic_sampling_groups_of_equal_rewards_stay(make: Callable[..., RolloutController]) -> None:
    collected = make(Replicas(), Verdicts(equal=[0, 2]), max_equal_groups=None).collect(0)

    assert ids(collected.groups) == [0, 1, 2, 3]
    assert collected.equal_reward_groups == 0


def test_rewards_that_differ_by_the_least_there_is_are_not_equal(make: Callable[..., RolloutController]) -> None:
    class Close(Rewards):
        async def score(self, group: RolloutGroup) -> ScoredGroup | RewardFailure:
            scored = await super().score(group)
            assert isinstance(scored, ScoredGroup)
            rewards = np.asarray([1.0, np.nextafter(np.float32(1.0), np.float32(2.0))], dtype=np.float32)
            return replace(scored, rewards=rewards)

    collected = make(Replicas(), Close(), max_equal_groups=1).collect(0)

    assert (ids(collected.groups), collected.equal_reward_groups) == ([0, 1, 2, 3], 0)


def test_too_many_groups_of_equal_rewards_end_the_run_and_say_why(make: Callable[..., RolloutController]) -> None:
    replicas = Replicas()
    controller = make(replicas, Verdicts(equal=[0, 2, 3]), max_equal_groups=2, max_concurrent=1)

    with pytest.raises(RewardError, match=r"dropped 3 groups .* kept 1 of 4") as caught:
        controller.collect(0)

    assert "rollouts.max_dropped_groups = 2" in str(caught.value)
    assert "2 rewards of 1:" in str(caught.value)
    assert replicas.asked() == [0, 1, 2, 3], "the third is one too many"


def test_as_many_groups_of_equal_rewards_as_allowed_are_survived(make: Callable[..., RolloutController]) -> None:
    collected = make(Replicas(), Verdicts(equal=[0, 2]), max_equal_groups=2).collect(0)

    assert (ids(collected.groups), collected.equal_reward_groups) == ([1, 3, 4, 5], 2)


def test_failed_groups_and_groups_of_equal_rewards_have_limits_of_their_own(
    make: Callable[..., RolloutController],
) -> None:
    rewards = Verdicts(equal=[0, 4], failing=[1, 3])

    collected = make(Replicas(), rewards, max_equal_groups=2, max_failures=2).collect(0)

    assert ids(collected.groups) == [2, 5, 6, 7]
    assert collected.equal_reward_groups == 2
    assert collected.failures == Counter(raised=2)


def test_too_many_groups_of_equal_rewards_cancel_what_is_in_flight(make: Callable[..., RolloutController]) -> None:
    replicas = Replicas(delays_s={0: FOREVER_S, 2: FOREVER_S})

    with pytest.raises(RewardError, match="dynamic sampling"):
        make(replicas, Verdicts(equal=[1]), max_equal_groups=0).collect(0)

    assert replicas.running == 0
    assert set(replicas.cancelled) == {0, 2}


# Greedy baselines.


def test_every_group_gets_the_reward_of_a_greedy_completion(make: Callable[..., RolloutController]) -> None:
    replicas = Replicas(delays_s={0: 0.03, 2: 0.01})
    sampling = replace(SAMPLING, stop=("end",), stop_token_ids=(7,))

    collected = make(replicas, Verdicts(), sampling=sampling, greedy_baseline=True).collect(0)

    assert ids(collected.groups) == [0, 1, 2, 3]
    assert [scored.greedy_reward for scored in collected.groups] == [0.5, 1.5, 2.5, 3.5]
    # The greedy completion is not trained on.
    assert all(len(scored.group.trajectories) == 2 for scored in collected.groups)
    assert all(scored.rewards.tolist() == [0.0, 1.0] for scored in collected.groups)
    greedy = replace(sampling, group_size=1, temperature=0.0)
    for number in range(4):
        calls = [(drawn, seed, version) for p, drawn, seed, version in replicas.calls if p.prompt_id == number]
        seed = group_seed(5, 0, number)
        assert sorted(calls, key=lambda call: call[0].group_size) == [(greedy, seed, 0), (sampling, seed, 0)]


def test_without_a_baseline_nothing_is_decoded_greedily(make: Callable[..., RolloutController]) -> None:
    replicas = Replicas()

    collected = make(replicas, Verdicts(), greedy_baseline=False).collect(0)

    assert [scored.greedy_reward for scored in collected.groups] == [None] * 4
    assert len(replicas.calls) == 4


def test_a_group_counts_once_and_not_with_its_greedy_completion(make: Callable[..., RolloutController]) -> None:
    replicas = Replicas()
    controller = make(replicas, Verdicts(), greedy_baseline=True, max_concurrent=16)

    assert [ids(controller.collect(version).groups) for version in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(replicas.calls) == 16


def test_groups_whose_own_or_greedy_reward_failed_are_replaced_and_counted_once(
    make: Callable[..., RolloutController], caplog: pytest.LogCaptureFixture
) -> None:
    # 1 fails in its greedy completion alone, 2 and 5 in both.
    rewards = Verdicts(failing=[2, 5], failing_greedy=[1])

    with caplog.at_level(logging.WARNING, logger="rlhf_ray"):
        collected = make(Replicas(), rewards, greedy_baseline=True).collect(0)

    assert ids(collected.groups) == [0, 3, 4, 6]
    assert [scored.greedy_reward for scored in collected.groups] == [0.5, 3.5, 4.5, 6.5]
    assert collected.failures == Counter(raised=2, timeout=1)
    assert any("bad greedy answer 1" in record.getMessage() for record in caplog.records)


def test_failed_greedy_rewards_count_against_the_limit(make: Callable[..., RolloutController]) -> None:
    with pytest.raises(RewardError, match=r"rewards\.max_failures = 1"):
        make(Replicas(), Verdicts(failing_greedy=[0, 2]), greedy_baseline=True, max_failures=1).collect(0)


def test_the_greedy_reward_does_not_make_a_group_unequal(make: Callable[..., RolloutController]) -> None:
    collected = make(Replicas(), Verdicts(equal=[1]), greedy_baseline=True, max_equal_groups=1).collect(0)

    assert (ids(collected.groups), collected.equal_reward_groups) == ([0, 2, 3, 4], 1)


def test_evaluation_has_no_greedy_baseline(make: Callable[..., RolloutController]) -> None:
    replicas = Replicas()

    make(replicas, Verdicts(), greedy_baseline=True).score_prompts([prompt(30)], SAMPLING, 0)

    assert [sampling for _, sampling, _, _ in replicas.calls] == [SAMPLING]


def test_an_error_cancels_the_greedy_completion_of_the_same_prompt(make: Callable[..., RolloutController]) -> None:
    class Broken(Replicas):
        async def generate(self, prompt: Prompt, sampling: SamplingSettings, **arguments: Any) -> RolloutGroup:
            if prompt.prompt_id == 1 and sampling == SAMPLING:
                await asyncio.sleep(0.02)
                raise ValueError("bug")
            return await super().generate(prompt, sampling, **arguments)

    replicas = Broken(delays_s=dict.fromkeys(range(4), FOREVER_S))

    with pytest.raises(ValueError, match="bug"):
        make(replicas, Verdicts(), greedy_baseline=True).collect(0)

    assert replicas.running == 0


# Asynchrony.


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.perf_counter() + 5.0
    while not condition():
        assert time.perf_counter() < deadline, "it did not happen within 5 s"
        time.sleep(0.002)


def test_groups_are_sent_between_collects(make: Callable[..., RolloutController]) -> None:
    replicas = Replicas(delays_s={5: FOREVER_S})
    controller = make(replicas, max_staleness=2, max_concurrent=3)

    controller.collect(0)

    # Three at once; each that ends makes room, until all twelve that version 0 may have are out.
    wait_for(lambda: sorted(replicas.asked()) == list(range(12)) and replicas.running == 1)
    assert ids(controller.collect(1).groups) == [4, 6, 7, 8], "5 has until version 2"


def test_a_straggler_holds_up_its_last_version_alone(make: Callable[..., RolloutController]) -> None:
    replicas = Replicas(delays_s={0: 0.3})
    controller = make(replicas, max_staleness=1, max_concurrent=99)

    first = controller.collect(0)
    assert (replicas.running, 0 in ids(first.groups)) == (1, False)
    second = controller.collect(1)
    assert (replicas.running, 0 in ids(second.groups)) == (0, True)


def test_a_partial_rollout_holds_up_no_version_and_is_asked_for_once(make: Callable[..., RolloutController]) -> None:
    replicas = Replicas(delays_s={0: FOREVER_S, 1: 0.5})
    controller = make(replicas, max_staleness=1, max_concurrent=99, partial_rollouts=True)

    carried, trained = [], []
    for version in range(4):
        collected = controller.collect(version)
        carried.append(collected.carried_groups)
        trained += ids(collected.groups)
        controller.published(version + 1)
    # Of version 0 they had to be in the batch of version 1; they went on as groups of version 1, and so forth.
    assert carried == [0, 2, 2, 2]
    assert not {0, 1} & set(trained)
    time.sleep(0.6)
    assert 1 in ids(controller.collect(4).groups), "the oldest goes first"
    assert Counter(replicas.asked()).most_common(1)[0][1] == 1


def test_each_group_is_asked_for_at_the_version_it_was_admitted_at(make: Callable[..., RolloutController]) -> None:
    replicas = Replicas()
    controller = make(replicas, max_staleness=1, max_concurrent=99)
    for version in range(3):
        controller.collect(version)
        controller.published(version + 1)
    wait_for(lambda: len(replicas.calls) == 20)

    asked = {p.prompt_id: (seed, version) for p, _, seed, version in replicas.calls}
    admitted = [0] * 8 + [1] * 4 + [2] * 4 + [3] * 4
    assert asked == {number: (group_seed(5, version, number), version) for number, version in enumerate(admitted)}


def test_a_version_on_its_way_to_the_replicas_admits_nothing(make: Callable[..., RolloutController]) -> None:
    replicas = Replicas()
    controller = make(replicas, max_staleness=1, max_concurrent=99)
    controller.collect(0)

    controller.collect(1)
    assert {version for _, _, _, version in replicas.calls} == {0}
    controller.published(1)
    wait_for(lambda: len(replicas.calls) == 12)
    assert [version for _, _, _, version in replicas.calls[8:]] == [1] * 4


def test_a_version_that_is_published_after_an_error_counts(make: Callable[..., RolloutController]) -> None:
    replicas = Replicas(delays_s={4: 0.02}, errors={4: [ValueError("a bug")]})
    controller = make(replicas, max_staleness=1, max_concurrent=99)
    controller.collect(0)
    wait_for(lambda: controller._flow._error is not None)
    controller.published(1)
    with pytest.raises(ValueError, match="a bug"):
        controller.collect(1)

    controller.collect(1)
    assert {version for _, _, _, version in replicas.calls[8:]} == {1}


def test_a_failed_group_is_replaced_between_collects(make: Callable[..., RolloutController]) -> None:
    replicas = Replicas(delays_s={6: 0.05, 7: 0.05, 8: 0.05})
    controller = make(replicas, Rewards(failing=[7]), max_staleness=1, max_concurrent=99)

    first = controller.collect(0)
    wait_for(lambda: 8 in replicas.asked())
    second = controller.collect(1)

    assert first.failures == Counter()
    assert second.failures == Counter(raised=1), "counted for the batch that was due"


def test_an_error_between_collects_is_raised_by_the_next_one(make: Callable[..., RolloutController]) -> None:
    replicas = Replicas(delays_s={6: 0.02}, errors={6: [ValueError("a bug")]})
    controller = make(replicas, max_staleness=1, max_concurrent=99)
    controller.collect(0)
    wait_for(lambda: replicas.running == 0)

    with pytest.raises(ValueError, match="a bug"):
        controller.collect(1)


def test_after_an_error_scored_groups_stay_and_the_others_are_sent_again(
    make: Callable[..., RolloutController],
) -> None:
    replicas = Replicas(delays_s={2: FOREVER_S, 1: 0.02}, errors={1: [ValueError("once")]})
    controller = make(replicas)
    with pytest.raises(ValueError, match="once"):
        controller.collect(0)
    replicas._delays_s.clear()

    assert ids(controller.collect(0).groups) == [0, 1, 2, 3]
    assert sorted(replicas.asked()) == [0, 1, 1, 2, 2, 3]


def test_a_restart_forgets_what_is_in_flight_and_what_is_scored(make: Callable[..., RolloutController]) -> None:
    replicas = Replicas(delays_s={4: FOREVER_S})
    controller = make(replicas, max_staleness=1, max_concurrent=99)
    controller.collect(0)
    wait_for(lambda: replicas.running == 1)

    controller.resume(3)

    assert (replicas.running, replicas.cancelled) == (0, [4])
    assert ids(controller.collect(3).groups) == [8, 9, 10, 11]


def test_evaluation_does_not_wait_for_training_rollouts(make: Callable[..., RolloutController]) -> None:
    replicas = Replicas(delays_s={4: FOREVER_S})
    controller = make(replicas, max_staleness=1, max_concurrent=99)
    controller.collect(0)

    assert ids(controller.score_prompts([prompt(90)], GREEDY, 1)) == [90]
    assert replicas.running == 1


def test_the_time_with_work_at_the_replicas_is_told(make: Callable[..., RolloutController]) -> None:
    replicas = Replicas(delays_s={0: 0.1, 4: 0.1})
    controller = make(replicas, max_concurrent=99)

    first = controller.collect(0)
    time.sleep(0.2)  # Nothing runs meanwhile.
    second = controller.collect(1)

    for collected in (first, second):
        assert 0.1 <= collected.generating_s < 0.2


def test_spans_say_which_replica_wrote_what(make: Callable[..., RolloutController]) -> None:
    controller = make(Replicas(delays_s={2: 0.1}), Rewards(delay_s=0.05))
    controller.score_prompts([prompt(90)], GREEDY, 0)

    first, second = controller.collect(0), controller.collect(1)

    written = {span.name: span for span in first.spans if span.lane == "replica r"}
    assert written.keys() == {"group 90", *(f"group {number}" for number in range(4))}
    assert written["group 2"].end - written["group 2"].start == pytest.approx(0.1, abs=0.05)
    assert abs(written["group 2"].end - time.time()) < 5.0
    assert {(span.lane, span.name) for span in second.spans} == {("replica r", f"group {n}") for n in range(4, 8)}


def test_a_wait_without_progress_ends_and_says_what_for(make: Callable[..., RolloutController]) -> None:
    replicas = Replicas(delays_s={2: FOREVER_S})
    controller = make(replicas, Rewards(), stall_timeout_s=0.2, timeout_s=FOREVER_S)

    with pytest.raises(RolloutError, match=r"rollouts\.stall_timeout_s = 0\.2 s") as caught:
        controller.collect(0)

    assert "3 scored groups of 4" in str(caught.value)
    assert "1 to be generated; the oldest is prompt 2" in str(caught.value)
    assert replicas.running == 0


class Stepping(SingleTurn):
    """An environment takes several steps, each shorter than the longest wait."""

    async def rollout(self, prompt: Prompt, engine: Engine, seeds: Seeds) -> RolloutGroup:
        for _ in range(6):
            await asyncio.sleep(0.1)
            engine.requests.stepped("game", "environment worker 1", 0.1, {"distance": 2.0})
        return await super().rollout(prompt, engine, seeds)


def test_steps_of_an_environment_are_progress_and_are_counted(make: Callable[..., RolloutController]) -> None:
    controller = make(Replicas(), rollouter=Stepping(), stall_timeout_s=0.3)
    collected = controller.collect(0)
    stats = collected.environments["game"]
    assert (stats.steps, stats.metrics) == (24, {"distance": (48.0, 24)})
    assert {span.lane for span in collected.spans} == {"replica r", "environment worker 1"}
    controller.score_prompts([prompt(30)], SAMPLING, 0)
    assert controller.collect(1).environments["game"].steps == 24, "evaluation is no part of the next batch"


class Failing(SingleTurn):
    """The environment of every other prompt fails."""

    async def rollout(self, prompt: Prompt, engine: Engine, seeds: Seeds) -> RolloutGroup | RewardFailure:
        if prompt.prompt_id % 2:
            return RewardFailure(group_id=prompt.prompt_id, kind="timeout", message="late", environment="game")
        return await super().rollout(prompt, engine, seeds)


def test_groups_whose_environment_failed_are_replaced_and_counted(make: Callable[..., RolloutController]) -> None:
    collected = make(Replicas(), rollouter=Failing(), max_failures=8).collect(0)
    assert ids(collected.groups) == [0, 2, 4, 6]
    assert collected.failures == Counter()
    assert collected.environments["game"].failures["timeout"] >= 3
    with pytest.raises(RewardError, match="game: timeout"):
        make(Replicas(), rollouter=Failing(), max_failures=2).collect(0)


def test_a_wait_for_a_reward_names_the_reward(make: Callable[..., RolloutController]) -> None:
    controller = make(Replicas(), Rewards(delay_s=FOREVER_S), stall_timeout_s=0.2)

    with pytest.raises(RolloutError, match="4 to be scored"):
        controller.collect(0)


def test_a_batch_is_given_again_where_what_followed_failed(make: Callable[..., RolloutController]) -> None:
    replicas = Replicas()
    controller = make(replicas)

    first, again = controller.collect(0), controller.collect(0)

    assert ids(again.groups) == ids(first.groups) == [0, 1, 2, 3]
    assert len(replicas.calls) == 4
    assert ids(controller.collect(1).groups) == [4, 5, 6, 7]


def test_a_published_version_is_sampled_before_it_is_collected(make: Callable[..., RolloutController]) -> None:
    replicas = Replicas()
    controller = make(replicas, max_staleness=1, max_concurrent=99)
    controller.collect(0)

    controller.published(1)

    wait_for(lambda: len(replicas.calls) == 12)
    assert {version for p, _, _, version in replicas.calls if p.prompt_id >= 8} == {1}


def test_a_synchronous_run_samples_nothing_before_a_collect(make: Callable[..., RolloutController]) -> None:
    replicas = Replicas()
    controller = make(replicas)
    controller.collect(0)

    controller.published(1)
    controller.score_prompts([], GREEDY, 1)  # After it on the loop.

    assert len(replicas.calls) == 4


def test_prompts_are_not_lost_where_the_stream_fails(make: Callable[..., RolloutController]) -> None:
    class Torn(Iterator[Prompt]):
        def __init__(self) -> None:
            self.next = 0

        def __next__(self) -> Prompt:
            self.next += 1
            if self.next == 3:
                raise DataError("torn")
            return prompt(self.next)

    replicas = Replicas()
    controller = make(replicas, prompts=Torn())
    with pytest.raises(DataError, match="torn"):
        controller.collect(0)

    assert ids(controller.collect(0).groups) == [1, 2, 4, 5]


def test_a_stream_that_ends_says_so(make: Callable[..., RolloutController]) -> None:
    with pytest.raises(DataError, match="has ended"):
        make(Replicas(), prompts=iter([prompt(0)])).collect(0)


def test_a_batch_that_nothing_will_complete_is_not_waited_for(make: Callable[..., RolloutController]) -> None:
    """Only a defect that loses a batch leads here; it must not hang."""
    controller = make(Replicas())
    controller.collect(0)
    controller._flow._last = None

    with pytest.raises(RolloutError, match="none in flight"):
        controller.collect(0)


def test_a_greedy_baseline_is_scored_when_both_requests_are_written(make: Callable[..., RolloutController]) -> None:
    class Slow(Replicas):
        async def generate(self, prompt: Prompt, sampling: SamplingSettings, **given: Any) -> RolloutGroup:
            if sampling.group_size > 1:
                await asyncio.sleep(FOREVER_S)
            return written(prompt, sampling)

    controller = make(Slow(), greedy_baseline=True, stall_timeout_s=0.2)

    with pytest.raises(RolloutError, match="4 to be generated"):
        controller.collect(0)


def test_a_thread_that_hangs_in_the_prompts_is_left_behind(
    make: Callable[..., RolloutController], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(thread_module, "_STOP_TIMEOUT_S", 0.1)
    released = threading.Event()

    def hanging() -> Iterator[Prompt]:
        released.wait(FOREVER_S)
        yield from endless()

    controller = make(Replicas(), prompts=hanging())
    threading.Thread(target=controller.collect, args=[0], daemon=True).start()
    time.sleep(0.05)
    with caplog.at_level(logging.WARNING, logger="rlhf_ray"):
        controller.stop()
    released.set()

    assert "groups in flight: stopping failed (TimeoutError" in caplog.text


# Where a run that stops now resumes.


class Stream(Iterator[Prompt]):
    """Prompts in order, with a position as the real stream has it."""

    def __init__(self, position: PromptPosition | None = None) -> None:
        self._position = position or PromptPosition()
        self._unfinished = list(self._position.unfinished)

    def __next__(self) -> Prompt:
        if self._unfinished:
            return prompt(self._unfinished.pop(0))
        self._position = replace(self._position, row=self._position.row + 1)
        return prompt(self._position.row - 1)

    def state(self) -> PromptPosition:
        return replace(self._position, unfinished=tuple(self._unfinished))


def test_where_nothing_is_stale_nothing_is_unfinished_after_an_update(make: Callable[..., RolloutController]) -> None:
    stream = Stream()
    controller = make(Replicas(), prompts=stream)
    controller.collect(0)

    assert controller.prompt_position(1) == PromptPosition(row=4)
    # An update that failed has to be done again.
    assert controller.prompt_position(0) == PromptPosition(row=4, unfinished=(0, 1, 2, 3))


@pytest.mark.parametrize("stopped_after", [1, 2, 3])
def test_a_resumed_run_trains_on_every_prompt_once(stopped_after: int, make: Callable[..., RolloutController]) -> None:
    """Some groups are in flight at the end, some wait for their update, and some rewards failed."""
    stream, rewards = Stream(), Rewards(failing=[2, 9, 17])
    slow = {number: 0.03 * (number % 4) for number in range(100)}
    overrides = {"max_staleness": 3, "max_concurrent": 12}
    controller = make(Replicas(delays_s=slow), rewards, prompts=stream, **overrides)
    trained = []
    for version in range(stopped_after):
        trained += ids(controller.collect(version).groups)
        controller.published(version + 1)
    position = controller.prompt_position(stopped_after)
    controller.stop()
    assert len(position.unfinished) >= 4
    assert not set(position.unfinished) & set(trained)

    again = Stream(position)
    other = make(Replicas(), rewards, prompts=again, **overrides)
    other.resume(stopped_after)
    for version in range(stopped_after, stopped_after + 12):
        trained += ids(other.collect(version).groups)
        other.published(version + 1)

    left = other.prompt_position(stopped_after + 12)
    assert len(trained) == len(set(trained)) == 4 * (stopped_after + 12)
    assert {*trained, *left.unfinished, *rewards.failed()} == set(range(left.row))
