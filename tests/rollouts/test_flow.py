"""The whole rollout flow under random schedules, on simulated time: slow, dying replicas, failing rewards, filters.

What single situations must lead to is in test_controller.py; the ledger alone in test_admission.py.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayActorError

from rlhf_ray.rollouts.admission import FlowRules
from rlhf_ray.rollouts.flow import RolloutFlow
from rlhf_ray.rollouts.rollouter import Engine, SingleTurn
from rlhf_ray.rollouts.tally import log_failures
from rlhf_ray.types import Prompt, RewardFailure, RolloutGroup, SamplingSettings, ScoredGroup, Trajectory, VersionSpan

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
UPDATES = 25


class RandomRun:
    """A learner that comes when it comes, over replicas and rewards that do what they like.

    Args:
        seed: Of everything that is random.
        staleness: The bound.
        partial: Whether stragglers are carried over.
        defects: Whether requests fail for good now and then: ``collect`` raises, and is called again.
        interrupts: Whether who collects gives up now and then, and calls again at once: Ctrl-C.
    """

    def __init__(
        self, seed: int, staleness: int, *, partial: bool = False, defects: bool = False, interrupts: bool = False
    ) -> None:
        self.rng = rng = random.Random(seed)
        self.staleness = staleness
        self.partial = partial
        self.batch_size = rng.randint(1, 6)
        self.max_concurrent = rng.choice([1, 3, 1000])
        self.slow = rng.choice([0.0, 0.1, 0.4])
        self.dying = rng.choice([0.0, 0.3])
        self.failing = rng.choice([0.0, 0.3])
        self.equal = rng.choice([0.0, 0.5])
        self.defect = 0.02 if defects else 0.0
        self.interrupting = 0.6 if interrupts else 0.0
        self.update_s = rng.choice([0.0, 1.0, 30.0])
        self.publication_s = rng.choice([0.0, 0.5, 40.0])
        self.version = 0
        """What the replicas have."""
        self.running = self.most_running = 0
        self.drawn: list[int] = []
        self.outcomes: dict[int, str] = {}
        self.trained: list[int] = []
        self.ages: list[int] = []
        self.counted: Counter[str] = Counter()
        self.errors = 0

    def prompts(self) -> Any:
        for number in itertools.count():
            self.drawn.append(number)
            yield Prompt(prompt_id=number, token_ids=np.zeros(1, dtype=np.int32), text="")

    async def generate(
        self, prompt: Prompt, sampling: SamplingSettings, *, seed: int, min_version: int, **_: Any
    ) -> RolloutGroup:
        assert min_version <= self.version, "asked for weights that no replica has"
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        first = self.version
        try:
            await asyncio.sleep(self.rng.expovariate(0.01 if self.rng.random() < self.slow else 1.0))
            if self.rng.random() < self.dying:
                raise RayActorError
            if self.rng.random() < self.defect:
                raise ArithmeticError
        finally:
            self.running -= 1
        # A token of each version that came by.
        versions = range(first, self.version + 1)
        completion = Trajectory.single_turn(
            token_ids=np.zeros(len(versions), dtype=np.int32),
            sampling_logprobs=np.zeros(len(versions), dtype=np.float32),
            asked_version=first,
            version_spans=tuple(VersionSpan(version=v, start=i, end=i + 1) for i, v in enumerate(versions)),
            finish_reason="stop",
        )
        return RolloutGroup(group_id=prompt.prompt_id, prompt=prompt, trajectories=(completion,) * 2, replica_id="r")

    async def score(self, group: RolloutGroup) -> ScoredGroup | RewardFailure:
        await asyncio.sleep(self.rng.expovariate(5.0))
        if self.rng.random() < self.failing:
            self.outcomes[group.group_id] = "failed"
            return RewardFailure(group_id=group.group_id, kind="raised", message="")
        is_equal = self.rng.random() < self.equal
        self.outcomes[group.group_id] = "equal" if is_equal else "scored"
        rewards = np.asarray([1.0, 1.0 if is_equal else 0.0], dtype=np.float32)
        return ScoredGroup(group=group, rewards=rewards, rewards_by_function={}, texts=(), reward_s=0.0)

    async def finish(self) -> None:
        self.flow = RolloutFlow(
            rollouter=SingleTurn(),
            engine=Engine(
                generate=self.generate,
                sampling=SamplingSettings(group_size=2, max_new_tokens=1, temperature=1.0),
                max_retries=1000,
                timeout_s=1e9,
            ),
            scorer=self,
            prompts=self.prompts(),
            rules=FlowRules(
                batch_size=self.batch_size,
                max_staleness=self.staleness,
                max_concurrent=self.max_concurrent,
                max_failures=1000,
                max_equal_groups=1000 if self.equal else None,
                partial_rollouts=self.partial,
                greedy_baseline=False,
                stall_timeout_s=1e9,
                seed=0,
            ),
        )
        loop = asyncio.get_running_loop()
        publication: asyncio.Future[None] = loop.create_future()
        publication.set_result(None)
        for version in range(UPDATES):
            while (collected := await self.collect(version)) is None:
                self.errors += 1
            self.book(version, collected)
            await asyncio.sleep(self.rng.random() * self.update_s)
            await publication  # One after the other.
            publication = asyncio.ensure_future(self.publish(version + 1))
            if self.staleness == 0:
                await publication
        await publication

    async def collect(self, version: int) -> Any:
        abandoned: list[asyncio.Task[Any]] = []
        while self.interrupting and self.rng.random() < self.interrupting:
            abandoned.append(asyncio.create_task(self.flow.collect(version)))
            await asyncio.sleep(self.rng.choice([0.0, self.rng.expovariate(1.0)]))
        collecting = asyncio.create_task(self.flow.collect(version))
        await asyncio.sleep(0)  # On a busy loop the next call comes before the end of the last one has come through.
        for task in abandoned:
            task.cancel()
        try:
            return await collecting
        except ArithmeticError:
            return None

    async def publish(self, version: int) -> None:
        await asyncio.sleep(self.rng.random() * self.publication_s)
        self.version = version
        self.flow.published(version)

    def book(self, version: int, collected: Any) -> None:
        assert len(collected.groups) == self.batch_size
        self.counted += Counter(failed=collected.failures.total(), equal=collected.equal_reward_groups)
        for scored in collected.groups:
            self.trained.append(scored.group.group_id)
            versions = [span.version for span in scored.group.trajectories[0].version_spans]
            # Of a partial rollout the tokens that are too old enter no loss: some token is not.
            self.ages.append(version - (max(versions) if self.partial else min(versions)))

    def assert_no_group_is_lost_doubled_or_too_old(self) -> None:
        assert max(self.ages) <= self.staleness
        assert min(self.ages) >= 0
        left = self.flow.unfinished(UPDATES)
        dropped = [number for number, outcome in self.outcomes.items() if outcome == "failed"]
        if self.equal:
            dropped += [number for number, outcome in self.outcomes.items() if outcome == "equal"]
        # A group whose verdict was still on its way when an error cancelled everything is in flight again.
        dropped = [number for number in dropped if number not in left]
        assert sorted([*self.trained, *left, *dropped]) == self.drawn
        assert self.most_running <= self.max_concurrent


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run it on the simulation's clock, which jumps, and ends the test where nothing would ever happen again."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from simulation import SimulatedTime

    def run_to_its_end(run: RandomRun) -> RandomRun:
        with asyncio.Runner(loop_factory=SimulatedTime) as runner:
            runner.run(run.finish())
            run.assert_no_group_is_lost_doubled_or_too_old()
            runner.run(run.flow.restart(0))
        return run

    return run_to_its_end


@pytest.mark.parametrize("staleness", [0, 1, 2, 5])
@pytest.mark.parametrize("seed", range(25))
def test_whatever_dies_fails_or_is_late(staleness: int, seed: int, finished: Any) -> None:
    run = finished(RandomRun(seed, staleness))

    outcomes = Counter(run.outcomes.values())
    assert run.counted["failed"] <= outcomes["failed"]
    assert run.counted["equal"] <= outcomes["equal"]


@pytest.mark.parametrize("staleness", [1, 2, 5])
@pytest.mark.parametrize("seed", [*range(25), 46, 90])  # In the last two a group is scored in its last version.
def test_partial_rollouts(staleness: int, seed: int, finished: Any) -> None:
    finished(RandomRun(seed, staleness, partial=True))


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("seed", range(25))
def test_errors_that_end_a_batch_and_are_survived(staleness: int, seed: int, finished: Any) -> None:
    finished(RandomRun(seed, staleness, defects=True))


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("seed", range(25))
def test_an_interrupted_collect_may_be_called_again(staleness: int, seed: int, finished: Any) -> None:
    finished(RandomRun(seed, staleness, interrupts=True))


def test_these_schedules_have_all_of_it(finished: Any) -> None:
    """Stale groups, failures, filters, errors: a run in which nothing happens would prove nothing."""
    runs = [finished(RandomRun(seed, 2, defects=True)) for seed in range(25)]

    assert sum(max(run.ages) == 2 for run in runs) >= 5
    assert sum(run.errors > 0 for run in runs) >= 5
    seen: Counter[str] = sum((Counter(run.outcomes.values()) for run in runs), Counter())
    assert min(seen["failed"], seen["equal"]) >= 100


def test_failed_rewards_that_no_batch_is_made_of_are_logged_once_per_kind(caplog: pytest.LogCaptureFixture) -> None:
    failures = [RewardFailure(group_id=i, kind=kind, message=f"why {i}") for i, kind in enumerate("aab")]
    log_failures(failures)
    assert [record.getMessage() for record in caplog.records] == [
        "group 0 has no reward (a): why 0",
        "group 2 has no reward (b): why 2",
    ]
