"""Evaluation: held-out prompts -> completions of one policy version -> rewards -> metrics per set."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from rlhf_ray.config.settings import Settings
from rlhf_ray.rewards.scoring import logged_means
from rlhf_ray.types import Prompt, RewardFailure, SamplingSettings, ScoredGroup, Trajectory

__all__ = ["Evaluator", "Outcomes", "evaluation_due", "evaluation_metrics", "evaluation_sampling", "pass_at_k"]


def evaluation_metrics(outcomes: Sequence[ScoredGroup | RewardFailure], *, pass_threshold: float) -> dict[str, Any]:
    """Metrics of one held-out set; failed rewards are counted and left out of the others.

    Args:
        outcomes: One per prompt; all groups have the same number of completions, n.
        pass_threshold: A completion passes with a reward of at least this.

    Returns:
        Key -> value. ``reward_stderr`` needs two scored prompts, ``pass_at_<k>`` (k = 1, 2, 4, ... and n) one.
    """
    scored = [outcome for outcome in outcomes if isinstance(outcome, ScoredGroup)]
    completions = [c for group in scored for c in group.group.trajectories]
    logged = logged_means(scored).items()
    return {
        **_reward_metrics(scored, pass_threshold),
        **{f"rewards/{name}/{metric}": mean for name, metrics in logged for metric, mean in metrics.items()},
        "num_prompts": len(outcomes),
        "failures": len(outcomes) - len(scored),
        "completion_tokens_mean": float(np.mean([c.num_sampled for c in completions])) if completions else 0.0,
        "truncated_fraction": float(np.mean([c.truncated for c in completions])) if completions else 0.0,
        **_environment_metrics(scored),
    }


def _environment_metrics(scored: Sequence[ScoredGroup]) -> dict[str, float]:
    played: defaultdict[str, list[Trajectory]] = defaultdict(list)
    for one in scored:
        if one.group.environment:
            played[one.group.environment] += one.group.trajectories
    if not played:
        return {}
    turns = [len(trajectory.all_turns) for one in scored for trajectory in one.group.trajectories]
    rewards = {name: [one.environment_reward for one in trajectories] for name, trajectories in played.items()}
    return {
        "turns_mean": float(np.mean(turns)),
        # Not ".../<name>/reward_mean": a name of a set may contain slashes, and this is not a set's reward.
        **{f"environment_reward_mean/{name}": float(np.mean(values)) for name, values in rewards.items()},
    }


def _reward_metrics(scored: Sequence[ScoredGroup], pass_threshold: float) -> dict[str, float]:
    if not scored:
        return {"reward_mean": math.nan}
    rewards = np.stack([group.rewards for group in scored]).astype(np.float64)
    metrics = {"reward_mean": float(rewards.mean())}
    if len(scored) > 1:
        # Completions of a prompt are not independent draws from the set; their means are.
        metrics["reward_stderr"] = float(rewards.mean(axis=1).std(ddof=1) / math.sqrt(len(scored)))
    return metrics | _pass_metrics(rewards >= pass_threshold)


def _pass_metrics(passed: npt.NDArray[np.bool_]) -> dict[str, float]:
    num_samples = passed.shape[1]
    ks = sorted({2**power for power in range(num_samples.bit_length())} | {num_samples})
    return {f"pass_at_{k}": float(pass_at_k(passed.sum(axis=1), num_samples, k).mean()) for k in ks}


def pass_at_k(num_passed: npt.NDArray[np.integer], num_samples: int, k: int) -> npt.NDArray[np.float64]:
    r"""Estimate, without bias, the probability that at least one of ``k`` samples passes.

    .. math:: \text{pass@}k = 1 - \binom{n - c}{k} / \binom{n}{k}
              = 1 - \prod_{i = n - c + 1}^{n} (1 - k / i)

    with ``n = num_samples`` and ``c = num_passed``; the product is the numerically stable form. Chen et al., Evaluating
    Large Language Models Trained on Code (arXiv:2107.03374, equation 1).

    Args:
        num_passed: ``[P]``, samples of each prompt that pass, 0 to n.
        num_samples: Samples per prompt, n.
        k: 1 to n.

    Returns:
        ``[P]``, a probability per prompt; their mean is the metric of a dataset.

    Raises:
        ValueError: ``k`` or a count is out of range.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k = {k} is not within 1 and num_samples = {num_samples}")
    passed = np.asarray(num_passed)
    if np.any((passed < 0) | (passed > num_samples)):
        raise ValueError(f"num_passed is not within 0 and num_samples = {num_samples}")
    i = np.arange(1, num_samples + 1)
    # A factor below 0 belongs to i < k, where fewer than k samples fail: the product then has the factor of i = k, 0.
    factors = np.where(i[None, :] > num_samples - passed[:, None], 1.0 - k / i[None, :], 1.0)
    probabilities: npt.NDArray[np.float64] = 1.0 - np.prod(np.maximum(factors, 0.0), axis=1)
    return probabilities


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
