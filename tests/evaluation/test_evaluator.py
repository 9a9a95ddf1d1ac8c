from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from rlhf_ray import PPOConfig
from rlhf_ray.config.settings import Settings
from rlhf_ray.evaluation.evaluator import Evaluator, Outcomes, evaluation_due, evaluation_sampling
from rlhf_ray.types import Prompt, SamplingSettings, ScoredGroup


class Samples:
    """Scores a prompt with its number; remembers what was asked for."""

    def __init__(self, scored: Callable[..., ScoredGroup]) -> None:
        self._scored = scored
        self.asked: list[tuple[int, int, int]] = []

    def score_prompts(self, prompts: Sequence[Prompt], sampling: SamplingSettings, version: int) -> Outcomes:
        self.asked.append((len(prompts), sampling.group_size, version))
        return tuple(self._scored(p.prompt_id, [p.prompt_id] * sampling.group_size) for p in prompts)


def settings(**evaluation: Any) -> Settings:
    config = PPOConfig().data(path="train.jsonl", eval_path={"low": "a.jsonl", "high": "b.jsonl"})
    return config.rewards(len).training(iterations=10).evaluation(**evaluation).settings


class Stream:
    """Prompts of a held-out set; remembers how many were asked for."""

    def __init__(self, *prompts: Prompt) -> None:
        self._prompts = prompts
        self.limits: list[int | None] = []

    def read_all(self, limit: int | None = None) -> tuple[Prompt, ...]:
        self.limits.append(limit)
        return self._prompts[:limit]


def test_all_sets_are_sampled_at_once_and_told_apart_again(
    prompt: Callable[[int], Prompt], scored: Callable[..., ScoredGroup]
) -> None:
    low, high = Stream(*map(prompt, (0, 1))), Stream(*map(prompt, (7, 8, 9, 10)))
    given = settings(samples_per_prompt=2, temperature=1.0, num_prompts=3)
    sampler, evaluator = Samples(scored), Evaluator(given, {"low": low, "high": high})
    first, second = evaluator.sample(sampler, 4), evaluator.sample(sampler, 5)

    assert sampler.asked == [(5, 2, 4), (5, 2, 5)]
    assert low.limits == high.limits == [3]
    assert {name: [one.group.group_id for one in of_set] for name, of_set in second.items()} == {  # type: ignore[union-attr]
        "low": [0, 1],
        "high": [7, 8, 9],
    }
    metrics = evaluator.metrics(first)
    assert (metrics["low"]["reward_mean"], metrics["high"]["reward_mean"]) == (0.5, 8.0)
    assert (metrics["low"]["pass_at_2"], metrics["high"]["pass_at_1"]) == (0.5, 1.0)


def test_without_sets_nothing_is_asked(scored: Callable[..., ScoredGroup]) -> None:
    sampler = Samples(scored)
    evaluator = Evaluator(settings(), {})
    assert evaluator.metrics(evaluator.sample(sampler, 0)) == {}
    assert sampler.asked == []


@pytest.mark.parametrize(
    ("given", "due"),
    [
        ({}, []),
        ({"interval": 4}, [4, 8]),
        ({"at_start": True}, [0]),
        ({"at_end": True}, [10]),
        ({"interval": 5, "at_start": True, "at_end": True}, [0, 5, 10]),
        ({"interval": 4, "at_end": True}, [4, 8, 10]),
    ],
)
def test_when_a_run_measures_itself(given: dict[str, Any], due: list[int]) -> None:
    made = settings(**given)
    assert [number for number in range(11) if evaluation_due(made, number)] == due


def test_one_greedy_completion_by_default_and_sampled_ones_where_asked() -> None:
    greedy = evaluation_sampling(settings())
    assert (greedy.group_size, greedy.temperature, greedy.top_p, greedy.max_new_tokens) == (1, 0.0, 1.0, 1024)
    sampled = evaluation_sampling(settings(samples_per_prompt=8, temperature=0.6, top_p=0.95, max_new_tokens=4))
    assert (sampled.group_size, sampled.temperature, sampled.top_p, sampled.max_new_tokens) == (8, 0.6, 0.95, 4)
