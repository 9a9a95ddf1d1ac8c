"""The pool on a real local Ray: every way a reward function can fail, and what the other groups see of it."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from rlhf_ray.config.settings import RewardSettings
from rlhf_ray.errors import ConfigError, DataError, RewardError
from rlhf_ray.rewards import RewardPool, math_equivalence
from rlhf_ray.rewards import pool as module
from rlhf_ray.rewards.arguments import TrainingProgress
from rlhf_ray.rewards.pool import MAX_GROUPS_PER_CALL
from rlhf_ray.types import RewardFailure, RolloutGroup, ScoredGroup

GroupOf = Callable[..., RolloutGroup]
Outcome = ScoredGroup | RewardFailure


def pool_of(
    *functions: Any, tokenizer: Any, tokenizer_path: str = "unused", num_cpus: float = 0.1, **settings: Any
) -> RewardPool:
    return RewardPool(
        RewardSettings(functions=list(functions), **settings),
        run_id="run",
        tokenizer_path=tokenizer_path,
        tokenizer=tokenizer,
        num_cpus=num_cpus,
        trust_remote_code=False,
        on_gpu=False,
    )


@contextmanager
def started(*functions: Any, tokenizer: Any, **options: Any) -> Iterator[RewardPool]:
    pool = pool_of(*functions, tokenizer=tokenizer, **options)
    pool.start()
    try:
        yield pool
    finally:
        pool.stop()


@pytest.fixture(scope="module")
def pool(cluster: None, tokenizer: Any) -> Iterator[RewardPool]:
    """One worker that runs ``behave``."""
    with started(behave, tokenizer=tokenizer, timeout_s=3.0) as pool:
        yield pool


@pytest.fixture(scope="module")
def async_pool(cluster: None, tokenizer: Any) -> Iterator[RewardPool]:
    """One worker that runs a ``Meeting``."""
    with started(Meeting(), tokenizer=tokenizer, timeout_s=3.0) as pool:
        yield pool


@contextmanager
def replaced(pool: RewardPool, *counts: int) -> Iterator[None]:
    """Check that within, so many workers are replaced."""
    before = pool.workers_replaced
    yield
    assert pool.workers_replaced - before in counts


def take_seconds(pool: RewardPool, seconds: float) -> None:
    """Have the pool know that a group takes so long."""
    pool._pools[0]._item_s = seconds


def actors(pool: RewardPool) -> list[Any]:
    return [worker.actor for worker in pool._pools[0]._workers]


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    """Run a test's coroutine, in a thread as the rollout controller does."""
    answers: list[Any] = []

    async def limited() -> Any:
        return await asyncio.wait_for(work(), 120)

    def target() -> None:
        try:
            answers.append(asyncio.run(limited()))
        except BaseException as error:  # Raised again in the test's own thread.
            answers.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if isinstance(answers[0], BaseException):
        raise answers[0]
    return answers[0]


def score_all(pool: RewardPool, groups: list[RolloutGroup]) -> list[Outcome]:
    async def together() -> list[Outcome]:
        return await asyncio.gather(*(pool.score(group) for group in groups))

    return run(together)


def behave(*, completions: list[str], marker: list[str] | None = None, **columns: Any) -> list[Any]:
    """A reward that does what its first completion says."""
    word = completions[0]
    if word == "raise":
        raise ValueError("cannot grade this")
    if word == "hang":
        time.sleep(60)
    if word == "die" or (word == "die once" and marker and not Path(marker[0]).exists()):
        if marker:
            Path(marker[0]).touch()
        os._exit(1)
    if word == "nap":
        time.sleep(0.8)
    answers = {
        "short": [1.0] * (len(completions) - 1),
        "nan": [float("nan")] * len(completions),
        "none": [None] * len(completions),
        "text": ["1"] * len(completions),
        "pid": [float(os.getpid())],
        "threads": [float(os.environ["OMP_NUM_THREADS"])],
    }
    return answers.get(word, [float(len(text)) for text in completions])


class Meeting:
    """Answers, after a while, how many calls run in its worker; or hangs."""

    def __init__(self) -> None:
        self._running = 0

    async def __call__(self, *, completions: list[str], **columns: Any) -> list[float]:
        self._running += 1
        count = self._running
        await asyncio.sleep(60 if completions[0] == "hang" else 0.3)
        self._running -= 1
        return [float(count)] * len(completions)


def test_groups_come_back_scored(cluster: None, tokenizer: Any, group_of: GroupOf) -> None:
    offset = 0.25

    def closure(*, completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        return [offset + float(text == gold) for text, gold in zip(completions, answer, strict=True)]

    async def judge(*, completions: list[str], **columns: Any) -> list[float]:
        await asyncio.sleep(0)
        return [10.0] * len(completions)

    def pid(*, completions: list[str], **columns: Any) -> list[float]:
        return [float(os.getpid())] * len(completions)

    groups = [group_of(["4", "5"], group_id=index, answer="4") for index in range(40)]
    functions = (closure, "length", judge, pid)
    with started(*functions, tokenizer=tokenizer, weights=[2.0, 1.0, 1.0, 0.0], num_workers=2) as pool:
        outcomes = score_all(pool, groups)
    assert all(outcome.group is group for outcome, group in zip(outcomes, groups, strict=True))
    for outcome in outcomes:
        assert outcome.rewards_by_function["closure"].tolist() == [1.25, 0.25]
        np.testing.assert_allclose(outcome.rewards, [12.5 - 0.002, 10.5 - 0.002], rtol=1e-6)
        assert outcome.texts == ("4", "5")
        assert outcome.reward_s > 0
    assert len({outcome.rewards_by_function["pid"][0] for outcome in outcomes}) == 2
    spans = pool.take_spans()
    assert {span.lane for span in spans} == {"reward worker 1", "reward worker 2"}
    assert spans[0].name.startswith("group ")
    assert pool.take_spans() == []


def test_a_tokenizer_is_loaded_from_its_folder(cluster: None, group_of: GroupOf, tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models

    backend = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1, "o": 111, "n": 110, "e": 101}, unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken("<eos>", special=True)])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with started("length", tokenizer=None, tokenizer_path=str(tmp_path), timeout_s=60.0) as pool:
        (outcome,) = score_all(pool, [group_of(["one"])])
    assert outcome.texts == ("one",)


def test_failures_are_counted_and_never_zero(pool: RewardPool, group_of: GroupOf) -> None:
    kinds = {
        "raise": "raised",
        "short": "wrong_length",
        "nan": "not_finite",
        "none": "all_none",
        "text": "wrong_type",
    }
    with replaced(pool, 0):
        *failures, fine = score_all(
            pool, [group_of([word, "x"], group_id=i) for i, word in enumerate([*kinds, "fine"])]
        )
    assert [(failure.group_id, failure.kind) for failure in failures] == list(enumerate(kinds.values()))
    assert "behave raised ValueError: cannot grade this" in failures[0].message
    assert f"({__file__}:" in failures[0].message
    assert fine.rewards.tolist() == [4.0, 1.0]


@pytest.mark.parametrize("seconds", [1e-4, 1.0], ids=["one call", "a call each"])
def test_a_hanging_function_is_killed_and_its_worker_replaced(
    pool: RewardPool, group_of: GroupOf, seconds: float
) -> None:
    (before,) = score_all(pool, [group_of(["pid"])])
    words = ["hang", "pid", "fine"]
    take_seconds(pool, seconds)
    # Sent together they hang together, and then each is sent by itself.
    with replaced(pool, *((1, 2) if seconds < 1 else (1,))):
        failure, after, fine = score_all(pool, [group_of([word], group_id=i) for i, word in enumerate(words)])
    assert failure.kind == "timeout"
    assert failure.group_id == 0
    assert "no answer after 3 s (rewards.timeout_s); reward worker 1 was killed" in failure.message
    assert after.rewards[0] != before.rewards[0]
    assert fine.rewards.tolist() == [4.0]


def test_quick_groups_share_a_call(cluster: None, tokenizer: Any, group_of: GroupOf) -> None:
    with started("length", tokenizer=tokenizer) as pool:
        take_seconds(pool, 1e-4)
        outcomes = score_all(pool, [group_of(["x" * (i % 7)], group_id=i) for i in range(200)])
        calls = [span.name for span in pool.take_spans()]
    assert [outcome.group.group_id for outcome in outcomes] == list(range(200))
    assert [len(outcome.texts[0]) for outcome in outcomes] == [i % 7 for i in range(200)]
    assert len(calls) < 50
    sizes = [1 + int(name.split()[3]) if "and" in name else 1 for name in calls]
    assert sum(sizes) == 200
    assert max(sizes) <= MAX_GROUPS_PER_CALL


def test_slow_groups_do_not_wait_for_each_other(pool: RewardPool, group_of: GroupOf) -> None:
    done: list[float] = []

    async def timed(group: RolloutGroup) -> None:
        await pool.score(group)
        done.append(time.perf_counter())

    async def together() -> None:
        take_seconds(pool, math.inf)
        await pool.score(group_of(["nap"]))
        await asyncio.gather(*(timed(group_of(["nap"], group_id=i)) for i in range(3)))

    run(together)
    assert done[1] - done[0] > 0.5
    assert done[2] - done[1] > 0.5


def test_a_bad_group_does_not_spoil_its_neighbors(pool: RewardPool, group_of: GroupOf) -> None:
    take_seconds(pool, 1e-4)

    async def together() -> list[Any]:
        groups = [group_of(["a"]), group_of(["b"], prompts="x"), group_of(["c"])]
        return await asyncio.gather(*(pool.score(group) for group in groups), return_exceptions=True)

    with replaced(pool, 0):
        first, bad, last = run(together)
    assert isinstance(first, ScoredGroup)
    assert isinstance(bad, DataError)
    assert isinstance(last, ScoredGroup)


def test_the_time_limit_does_not_count_the_wait_for_a_worker(pool: RewardPool, group_of: GroupOf) -> None:
    take_seconds(pool, 1e-4)  # all in one call, at first
    start = time.perf_counter()
    with replaced(pool, 0):
        outcomes = score_all(pool, [group_of(["nap"], group_id=i) for i in range(5)])
    assert time.perf_counter() - start > 3.0
    assert all(isinstance(outcome, ScoredGroup) for outcome in outcomes)


def test_a_function_that_kills_its_worker(cluster: None, tokenizer: Any, group_of: GroupOf, tmp_path: Path) -> None:
    words = ["fine", "die once", "die", "fine"]
    groups = [group_of([word], group_id=i, marker=str(tmp_path / word)) for i, word in enumerate(words)]
    with started(behave, tokenizer=tokenizer, timeout_s=60.0) as pool:
        take_seconds(pool, 1.0)  # a call each
        outcomes = score_all(pool, groups)
    assert [isinstance(outcome, ScoredGroup) for outcome in outcomes] == [True, True, False, True]
    assert outcomes[2].kind == "worker_died"
    assert "died at the second try" in outcomes[2].message
    assert pool.workers_replaced == 3


def test_an_async_function_that_kills_its_worker(cluster: None, tokenizer: Any, group_of: GroupOf) -> None:
    async def judge(*, completions: list[str], **columns: Any) -> list[float]:
        await asyncio.sleep(0.2)
        if completions[0] == "die":
            os._exit(1)
        await asyncio.sleep(0.2)
        return [1.0] * len(completions)

    groups = [group_of([word], group_id=i) for i, word in enumerate(["fine", "die", "fine", "fine"])]
    with started(judge, tokenizer=tokenizer, timeout_s=60.0) as pool:
        outcomes = score_all(pool, groups)
    # All four fail together; isolated, only the one to blame does again.
    assert [isinstance(outcome, ScoredGroup) for outcome in outcomes] == [True, False, True, True]
    assert outcomes[1].kind == "worker_died"
    assert pool.workers_replaced == 2


def test_workers_take_one_computing_thread(pool: RewardPool, group_of: GroupOf) -> None:
    assert score_all(pool, [group_of(["threads"])])[0].rewards.tolist() == [1.0]


def test_a_cancelled_caller_leaves_the_worker_usable(pool: RewardPool, group_of: GroupOf) -> None:
    async def impatient() -> list[Outcome]:
        words = ["nap", "nap", "hang"]  # being scored, sent ahead, and waiting for a worker
        tasks = [asyncio.create_task(pool.score(group_of([word]))) for word in words]
        await asyncio.sleep(0.2)
        for task in tasks:
            task.cancel()
        return [await pool.score(group_of(["nap"], group_id=i)) for i in range(2)]

    with replaced(pool, 0):
        outcomes = run(impatient)
    assert all(isinstance(outcome, ScoredGroup) for outcome in outcomes)


def test_a_bad_column_is_an_error_of_the_data(pool: RewardPool, group_of: GroupOf) -> None:
    with replaced(pool, 0):
        with pytest.raises(DataError, match="'prompts'"):
            score_all(pool, [group_of(["x"], prompts="x")])
        assert isinstance(score_all(pool, [group_of(["fine"])])[0], ScoredGroup)


def test_an_error_outside_of_the_functions_is_raised(cluster: None, group_of: GroupOf) -> None:
    class Defective:
        def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
            if token_ids[0] == ord("!"):
                raise LookupError("no such token")
            return "text"

    def zero(*, completions: list[str], **columns: Any) -> list[float]:
        return [0.0 for _ in completions]

    with started(zero, tokenizer=Defective()) as pool, replaced(pool, 0):
        with pytest.raises(RewardError, match=r"outside of the reward functions: LookupError\('no such token'\)"):
            score_all(pool, [group_of(["!"])])
        assert isinstance(score_all(pool, [group_of(["fine"])])[0], ScoredGroup)


def test_async_functions_share_a_worker(async_pool: RewardPool, group_of: GroupOf) -> None:
    with replaced(async_pool, 0):
        outcomes = score_all(async_pool, [group_of(["x"], group_id=i) for i in range(40)])
    assert max(outcome.rewards[0] for outcome in outcomes) == 16


def test_groups_beside_a_hanging_one_are_sent_again(async_pool: RewardPool, group_of: GroupOf) -> None:
    async def staggered() -> list[Outcome]:
        hanging = asyncio.create_task(async_pool.score(group_of(["hang"])))
        await asyncio.sleep(2.9)
        return await asyncio.gather(hanging, *(async_pool.score(group_of(["x"], group_id=i)) for i in range(4)))

    with replaced(async_pool, 1):
        hanging, *others = run(staggered)
    assert hanging.kind == "timeout"
    assert all(isinstance(outcome, ScoredGroup) for outcome in others)


def limits_itself(*, completions: list[str], **columns: Any) -> list[float]:
    def stop(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        time.sleep(30)
    except TimeoutError:
        return [0.5] * len(completions)
    return [0.0] * len(completions)


def test_functions_may_use_signals(cluster: None, tokenizer: Any, group_of: GroupOf) -> None:
    with started(limits_itself, tokenizer=tokenizer, timeout_s=20.0) as pool:
        (outcome,) = score_all(pool, [group_of(["x"])])
    assert outcome.rewards.tolist() == [0.5]
    assert pool.workers_replaced == 0


def test_math_that_is_never_finished_costs_no_worker(cluster: None, tokenizer: Any, group_of: GroupOf) -> None:
    group = group_of(["$10^{10^{10}}$", "\\boxed{(x+y+z)^{200}}", "\\boxed{0.5}"], answer="\\frac{1}{2}")
    with started(math_equivalence(timeout_s=1), tokenizer=tokenizer, timeout_s=60.0) as pool:
        (outcome,) = score_all(pool, [group])
    assert outcome.rewards.tolist() == [0.0, 0.0, 1.0]
    assert pool.workers_replaced == 0


def test_stop_ends_every_wait(cluster: None, tokenizer: Any, group_of: GroupOf) -> None:
    async def stopped(pool: RewardPool) -> list[Any]:
        scoring = [asyncio.create_task(pool.score(group_of(["hang"], group_id=i))) for i in range(3)]
        await asyncio.sleep(0.3)
        await asyncio.to_thread(pool.stop)
        return await asyncio.wait_for(asyncio.gather(*scoring, return_exceptions=True), 10)

    with started(behave, tokenizer=tokenizer) as pool:
        errors = run(lambda: stopped(pool))
    assert [type(error) for error in errors] == [RewardError] * 3
    assert "the reward worker pool is stopped" in str(errors[0])
    assert pool.workers_replaced == 0
    with pytest.raises(RewardError, match="the reward worker pool is stopped"):
        score_all(pool, [group_of()])
    pool.stop()


def test_a_start_ends_when_the_pool_is_stopped(cluster: None, tokenizer: Any) -> None:
    pool = pool_of(behave, tokenizer=tokenizer, num_workers=40)  # More than there are CPUs for.
    stopping = [threading.Timer(seconds, pool.stop) for seconds in (1.0, 1.0, 1.1)]
    for timer in stopping:
        timer.start()
    with pytest.raises(RewardError, match="the reward worker pool is stopped"):
        pool.start()
    for timer in stopping:
        timer.join(10)
        assert not timer.is_alive()


def test_workers_that_cannot_be_replaced_end_the_waits(
    cluster: None, tokenizer: Any, group_of: GroupOf, tmp_path: Path
) -> None:
    judge = Judge(tmp_path / "gone")

    async def together(pool: RewardPool) -> list[Any]:
        scoring = (pool.score(group_of(["x"], group_id=i)) for i in range(3))
        return await asyncio.gather(*scoring, return_exceptions=True)

    with started(judge, tokenizer=tokenizer) as pool:
        errors = run(lambda: together(pool))
    assert [type(error) for error in errors] == [RewardError] * 3
    assert "cannot start" in str(errors[0])
    assert "the judge's model is gone" in str(errors[0])
    with pytest.raises(RewardError, match="cannot start"), started(judge, tokenizer=tokenizer):
        pass


@pytest.mark.slow
def test_a_worker_that_dies_before_it_stands_is_started_again_twice(
    cluster: None, tokenizer: Any, group_of: GroupOf, tmp_path: Path
) -> None:
    deaths = tmp_path / "deaths"
    deaths.write_text("2")
    with started(Unlucky(deaths), tokenizer=tokenizer) as pool:
        ray.kill(actors(pool)[0])
        deaths.write_text("2")
        assert [type(outcome) for outcome in score_all(pool, [group_of(["x"])])] == [ScoredGroup]
    assert pool.workers_replaced == 1

    deaths.write_text("3")
    with pytest.raises(RewardError, match="cannot start"), started(Unlucky(deaths), tokenizer=tokenizer):
        pass


def test_workers_that_died_together_cost_no_group(cluster: None, tokenizer: Any, group_of: GroupOf) -> None:
    with started(behave, tokenizer=tokenizer, num_workers=3) as pool:
        for actor in actors(pool):
            ray.kill(actor)
        assert [type(outcome) for outcome in score_all(pool, [group_of(["x"])])] == [ScoredGroup]


class Unlucky:
    """Ends its process when it comes there, as often as a file says."""

    def __init__(self, deaths: Path) -> None:
        self._deaths = deaths

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if (left := int(self._deaths.read_text())) > 0:
            self._deaths.write_text(f"{left - 1}")
            os._exit(1)

    def __call__(self, *, completions: list[str], **columns: Any) -> list[float]:
        return [1.0] * len(completions)


class Judge:
    """Dies when it is called, and cannot be loaded again."""

    def __init__(self, gone: Path) -> None:
        self._gone = gone

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._gone.exists():
            raise OSError("the judge's model is gone")

    def __call__(self, **columns: Any) -> list[float]:
        self._gone.touch()
        os._exit(1)


def test_wrong_settings_fail_before_anything_starts(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"rewards\.functions\[0\]"):
        pool_of("no_such_reward", tokenizer=tokenizer)


def test_a_worker_that_finds_no_cpu_says_so(cluster: None, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STARTUP_TIMEOUT_S", 0.5)
    with pytest.raises(RewardError, match=r"did not start in 0\.5 s.*cpus_per_reward_worker"):
        pool_of("length", tokenizer=tokenizer, num_cpus=1e6).start()


def test_what_functions_are_told_and_log_travels(cluster: None, tokenizer: Any, group_of: GroupOf) -> None:
    def told(*, completions: list[str], trainer_state: Any, log_metric: Any, log_extra: Any, **columns: Any) -> Any:
        log_metric("length", len(completions[0]))
        log_extra("text", completions)
        return [float(trainer_state.max_steps)] * len(completions)

    with started(told, tokenizer=tokenizer) as pool:
        pool.progress = TrainingProgress(max_steps=9)
        scored = run(lambda: pool.score(group_of(["one", "three"])))
        pool.progress = TrainingProgress(max_steps=10)
        later = run(lambda: pool.score(group_of(["one", "three"])))
    assert (scored.rewards.tolist(), later.rewards.tolist()) == ([9.0, 9.0], [10.0, 10.0])
    assert scored.logged == {"told": {"length": [3.0]}}
    assert scored.extras == {"told/text": ("one", "three")}
