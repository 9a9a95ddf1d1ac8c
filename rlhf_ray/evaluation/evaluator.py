"""Evaluation: held-out prompts -> completions of one policy version -> rewards -> metrics per set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from rlhf_ray.config.settings import Settings
from rlhf_ray.evaluation.metrics import evaluation_metrics
from rlhf_ray.types import Prompt, RewardFailure, SamplingSettings, ScoredGroup

__all__ = ["Evaluator", "Outcomes", "evaluation_due", "evaluation_sampling"]

Outcomes: TypeAlias = tuple[ScoredGroup | RewardFailure, ...]
"""``[P]``, one per prompt, in the order of the set."""


class HeldOutPrompts(Protocol):
    """What an evaluation needs of a ``PromptStream`` over a held-out set."""

    def read_all(self, limit: int | None = None) -> tuple[Prompt, ...]:
        """Read the prompts, or the first ``limit`` of them."""
        ...


class Sampler(Protocol):
    """What an evaluation needs of the rollout controller."""

    def score_prompts(self, prompts: Sequence[Prompt], sampling: SamplingSettings, version: int) -> Outcomes:
        """Sample and score prompts with exactly that policy version."""
        ...


class Evaluator:
    """Measures policies on the held-out sets of a run, which are read at the first measurement.

    Args:
        settings: The run's settings.
        held_out: Name of a set -> its prompts.
    """

    def __init__(self, settings: Settings, held_out: Mapping[str, HeldOutPrompts]) -> None:
        self._held_out = held_out
        self._sampling = evaluation_sampling(settings)
        self._limit = settings.evaluation.num_prompts
        self._pass_threshold = settings.evaluation.pass_threshold
        self._prompts: dict[str, tuple[Prompt, ...]] = {}

    def sample(self, sampler: Sampler, version: int) -> dict[str, Outcomes]:
        """Name of a set -> its scored groups; empty where a run has none.

        All sets are sampled at once, so that the replicas wait for the longest completions once and not once per set.
        """
        for name, stream in self._held_out.items():
            if name not in self._prompts:
                self._prompts[name] = stream.read_all(self._limit)
        every = [prompt for prompts in self._prompts.values() for prompt in prompts]
        outcomes = iter(sampler.score_prompts(every, self._sampling, version)) if every else iter(())
        return {name: tuple(next(outcomes) for _ in prompts) for name, prompts in self._prompts.items()}

    def metrics(self, outcomes: Mapping[str, Outcomes]) -> dict[str, dict[str, Any]]:
        """Name of a set -> its metrics."""
        return {
            name: evaluation_metrics(of_set, pass_threshold=self._pass_threshold) for name, of_set in outcomes.items()
        }


def evaluation_due(settings: Settings, iteration: int) -> bool:
    """Whether a run measures itself after an iteration; 0: before the first."""
    evaluation = settings.evaluation
    if iteration == 0:
        return evaluation.at_start
    at_interval = evaluation.interval > 0 and iteration % evaluation.interval == 0
    return at_interval or (evaluation.at_end and iteration == settings.training.iterations)


def evaluation_sampling(settings: Settings) -> SamplingSettings:
    """How completions are drawn in evaluation: one per prompt, greedy by default."""
    rollouts, evaluation = settings.rollouts, settings.evaluation
    return SamplingSettings(
        group_size=evaluation.samples_per_prompt,
        max_new_tokens=evaluation.max_new_tokens or rollouts.max_new_tokens,
        temperature=evaluation.temperature,
        top_p=evaluation.top_p,
        stop=tuple(rollouts.stop),
        stop_token_ids=tuple(rollouts.stop_token_ids),
    )
