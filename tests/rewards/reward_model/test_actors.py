"""Reward models on a real local Ray: batches, deaths, bad models, functions next to them, and the end."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import RayActorError

from rlhf_ray import RewardModelReward
from rlhf_ray.config.settings import RewardSettings
from rlhf_ray.errors import ConfigError, RewardError
from rlhf_ray.rewards import RewardPool
from rlhf_ray.rewards import pool as module
from rlhf_ray.rewards.reward_model.model import RewardModel
from rlhf_ray.rewards.scoring import Scores
from rlhf_ray.rewards.workers import ScoringRequest
from rlhf_ray.types import RewardFailure, RolloutGroup, ScoredGroup

pytestmark = pytest.mark.usefixtures("cluster")

GroupOf = Callable[..., RolloutGroup]


@contextmanager
def started(tokenizer: Any, *functions: Any, weights: list[float], run_id: str = "run") -> Iterator[RewardPool]:
    pool = RewardPool(
        RewardSettings(functions=list(functions), weights=weights),
        run_id=run_id,
        tokenizer_path="unused",
        tokenizer=tokenizer,
        num_cpus=0.1,
        trust_remote_code=False,
        on_gpu=False,
    )
    try:
        pool.start()
        yield pool
    finally:
        pool.stop()


@contextmanager
def model_started(tokenizer: Any, path: str, *, run_id: str = "run", **options: Any) -> Iterator[RewardPool]:
    model = RewardModelReward(path, dtype="float32", **options)
    with started(tokenizer, model, weights=[2.0], run_id=run_id) as pool:
        yield pool


def actors(pool: RewardPool) -> list[Any]:
    return [worker.actor for worker in pool._pools[-1]._workers]


def score_all(pool: RewardPool, groups: Sequence[RolloutGroup]) -> list[ScoredGroup | RewardFailure]:
    async def all_at_once() -> list[ScoredGroup | RewardFailure]:
        return list(await asyncio.gather(*(pool.score(group) for group in groups)))

    return asyncio.run(all_at_once())


def expected(path: str, groups: Sequence[RolloutGroup], texts: Sequence[Sequence[str]]) -> list[Any]:
    model = RewardModel(RewardModelReward(path, dtype="float32"))
    return [
        model.scores(model.encoded([group.prompt.text] * len(of_group), of_group))
        for group, of_group in zip(groups, texts, strict=True)
    ]


def named(prefix: str) -> list[str]:
    """Names of the actors that are alive."""
    every = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in every if actor["name"].startswith(prefix)]


def wait_until_dead(actor: Any) -> None:
    """``ray.kill`` returns before its actor is dead, which may still answer a call or begin one."""
    deadline = time.monotonic() + 10.0
    with pytest.raises(RayActorError):
        while time.monotonic() < deadline:
            ray.get(actor.ready.remote(), timeout=10.0)


TEXTS = [[f"{a}" * (a % 7 + 1), f"{a + 1}"] for a in range(30)]


def test_many_groups_at_once_a_death_in_between_and_nothing_left(
    model_path: str, tokenizer: Any, group_of: GroupOf
) -> None:
    groups = [group_of(texts, prompt=f"{n}+1=", group_id=n) for n, texts in enumerate(TEXTS)]
    prefix = f"run-{os.urandom(3).hex()}"
    with model_started(tokenizer, model_path, run_id=prefix, max_tokens_per_batch=256) as pool:
        first = score_all(pool, groups)
        assert len(pool.take_spans()) < len(groups)  # Groups share calls.
        ray.kill(actors(pool)[0])
        second = score_all(pool, groups)
        assert pool.workers_replaced == 1
        assert named(prefix) == [f"{prefix}-reward_model-2"]
    for outcomes in (first, second):
        for outcome, values, texts in zip(outcomes, expected(model_path, groups, TEXTS), TEXTS, strict=True):
            assert isinstance(outcome, ScoredGroup)
            np.testing.assert_allclose(outcome.rewards_by_function["reward_model"], values, atol=1e-5)
            np.testing.assert_allclose(outcome.rewards, 2.0 * values, atol=1e-5)
            assert outcome.texts == tuple(texts)
    deadline = time.monotonic() + 10.0
    while named(prefix) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert named(prefix) == []
    with pytest.raises(RewardError, match="the reward_model pool is stopped"):
        score_all(pool, groups[:1])


def test_a_model_that_cannot_be_used_ends_the_start(make: Callable[..., str], tokenizer: Any) -> None:
    from safetensors.torch import load_file, save_file

    path = make()
    weights = load_file(f"{path}/model.safetensors")
    del weights["score.weight"]
    save_file(weights, f"{path}/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="lacks weights of a trained reward model"), model_started(tokenizer, path):
        pass


class FakeWorker:
    """Stands for a model: scores 1, except that a text may end the process, hang, raise, or be NaN or too long."""

    def __init__(self, *given: Any) -> None:
        import os
        from pathlib import Path

        # What would be the path of the model.
        lives = Path(given[1].path)
        if lives.exists() and (left := int(lives.read_text())) > 0:
            lives.write_text(f"{left - 1}")
            os._exit(1)

    def ready(self) -> None: ...

    def work(self, requests: Sequence[ScoringRequest]) -> list[Scores | RewardFailure]:
        import os
        import time

        outcomes: list[Scores | RewardFailure] = []
        for group, _ in requests:
            text = group.prompt.text
            if text == "die":
                os._exit(1)
            if text == "hang":
                time.sleep(60)
            if text == "raise":
                raise MemoryError("out of memory")
            one = np.ones(len(group.trajectories))
            outcomes.append(Scores(values={"reward_model": one}, texts=(), reward_s=0.0))
        return outcomes


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    # Made anew, so that it has no module that a worker would have to import.
    fake = type("Fake", (), {name: value for name, value in vars(FakeWorker).items() if not name.startswith("__d")})
    fake.__module__ = "__main__"
    monkeypatch.setattr(module, "RewardModelWorker", fake)


@pytest.mark.slow
@pytest.mark.usefixtures("fake")
def test_an_actor_that_dies_before_it_stands_is_started_again_twice(
    tokenizer: Any, group_of: GroupOf, tmp_path: Path
) -> None:
    deaths = tmp_path / "deaths"
    with model_started(tokenizer, str(deaths)) as pool:
        ray.kill(actors(pool)[0])
        deaths.write_text("2")
        assert [type(outcome) for outcome in score_all(pool, [group_of(["a"])])] == [ScoredGroup]
    assert pool.workers_replaced == 1


@pytest.mark.usefixtures("fake")
def test_actors_that_died_together_cost_no_group(tokenizer: Any, group_of: GroupOf) -> None:
    with model_started(tokenizer, "unused", num_workers=3) as pool:
        for actor in actors(pool):
            ray.kill(actor)
            wait_until_dead(actor)
        assert [type(outcome) for outcome in score_all(pool, [group_of(["a"])])] == [ScoredGroup]


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("text", "kind", "message", "replaced"),
    [
        ("die", "worker_died", "reward_model 1 died at the second try", 2),
        ("hang", "timeout", "no answer after 1.5 s (timeout_s of reward_model)", 2),
        ("raise", "raised", "MemoryError", 0),
    ],
)
def test_only_the_group_that_is_to_blame_fails(
    text: str, kind: str, message: str, replaced: int, tokenizer: Any, group_of: GroupOf
) -> None:
    groups = [group_of(["a"], prompt=text if n == 2 else "fine", group_id=n) for n in range(6)]
    with model_started(tokenizer, "unused", timeout_s=1.5) as pool:
        score_all(pool, groups[:1])  # The first call of an actor imports what it needs.
        outcomes = score_all(pool, groups)
        assert pool.workers_replaced == replaced
        assert {span.lane for span in pool.take_spans()} == {"reward_model 1"}
    failure = outcomes.pop(2)
    assert isinstance(failure, RewardFailure)
    assert (failure.group_id, failure.kind) == (2, kind)
    assert message in failure.message
    assert all(isinstance(outcome, ScoredGroup) for outcome in outcomes)


def test_functions_and_models_add_up(model_path: str, tokenizer: Any, group_of: GroupOf) -> None:
    def short(*, completions: list[str], **columns: Any) -> list[float | None]:
        return [None if text == "none" else float(len(text) < 3) for text in completions]

    model = RewardModelReward(model_path, dtype="float32")
    group, texts = group_of(["ab", "abcd", "none"], prompt="1+1="), [["ab", "abcd", "none"]]
    with started(tokenizer, short, model, weights=[0.5, 2.0]) as pool:
        scored, too_long = score_all(pool, [group, group_of(["x" * 300], group_id=3)])
        lanes = {span.lane for span in pool.take_spans()}
        assert pool.workers_replaced == 0
    assert lanes == {"reward worker 1", "reward_model 1"}
    assert isinstance(scored, ScoredGroup)
    (values,) = expected(model_path, [group], texts)
    np.testing.assert_allclose(scored.rewards, 2.0 * values + [0.5, 0.0, 0.0], atol=1e-5)
    assert list(scored.rewards_by_function) == ["short", "reward_model"]
    np.testing.assert_array_equal(scored.rewards_by_function["short"], [1.0, 0.0, np.nan])
    assert scored.texts == tuple(texts[0])
    assert isinstance(too_long, RewardFailure)
    assert "set overlong to truncate_left" in too_long.message
