"""Asynchronous training on the real stack: generation goes on while learners compute and weights change."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray import PPOConfig
from rlhf_ray.algorithm.algorithm import Algorithm
from rlhf_ray.quickstart import model_path
from rlhf_ray.reporting.metrics import flatten, metric_for
from rlhf_ray.types import ScoredGroup

pytestmark = pytest.mark.engine

STALENESS = 1
BATCH = 12
"""So small that updates end before the longest completions: a part of them is carried over."""


@pytest.fixture(scope="module")
def long_winded(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded model with random weights: it seldom ends a completion, so publications come in the middle."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("models") / "random"
    shutil.copytree(model_path(), folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def asynchronous(
    cluster: None, long_winded: str, small: Callable[[Path], PPOConfig], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Algorithm]:
    algorithm = (
        small(tmp_path_factory.mktemp("run") / "asynchronous")
        .model(path=long_winded)
        .data(batch_size=BATCH)
        # One completion a group: others overtake the longest.
        .rollouts(group_size=1, max_staleness=STALENESS, max_new_tokens=300, partial_rollouts=True)
        .learners(num_learners=1, max_tokens_per_microbatch=1024, gradient_checkpointing=False)
        .training(kl_coef=0.0, lr=2e-4, critic_lr=3e-4, lambda_=0.95, lr_schedule="linear")
        .evaluation(num_prompts=8)
        .reporting(timeline_interval=2)
        .build_algo()
    )
    yield algorithm
    algorithm.stop()


@pytest.fixture(scope="module")
def iterations(asynchronous: Algorithm) -> list[tuple[dict[str, Any], tuple[ScoredGroup, ...]]]:
    """Results of some iterations, and the groups that each was trained on."""
    seen: list[tuple[ScoredGroup, ...]] = []
    collect = asynchronous._running().controller.collect

    def remembering(version: int) -> Any:
        collected = collect(version)
        seen.append(collected.groups)
        return collected

    asynchronous._running().controller.collect = remembering  # type: ignore[method-assign]
    results = [asynchronous.train() for _ in range(8)]
    return list(zip(results, seen, strict=True))


def test_staleness_is_used_and_keeps_its_bound(iterations: list[tuple[dict[str, Any], Any]]) -> None:
    worst = [result["rollouts"]["staleness_max"] for result, _ in iterations]

    assert worst[0] == 0
    assert 1 <= max(worst) <= STALENESS
    for result, _ in iterations:
        assert sum(result["rollouts"]["staleness_fraction"].values()) == pytest.approx(1.0)
        assert [key for key in flatten(result) if metric_for(key) is None] == []


def test_partial_rollouts_are_trained_on_as_far_as_they_are_fresh_enough(
    iterations: list[tuple[dict[str, Any], tuple[ScoredGroup, ...]]],
) -> None:
    for number, (result, groups) in enumerate(iterations):
        spans = [span for scored in groups for c in scored.group.trajectories for span in c.version_spans]
        sizes = [span.end - span.start for span in spans]
        fresh = [size for span, size in zip(spans, sizes, strict=True) if span.version >= number - STALENESS]
        assert result["rollouts"]["in_loss_fraction"] == pytest.approx(sum(fresh) / sum(sizes))
    assert sum(result["rollouts"]["carried_groups"] for result, _ in iterations) > 0
    assert min(result["rollouts"]["in_loss_fraction"] for result, _ in iterations) < 1.0


def test_weights_change_in_the_middle_of_completions(
    iterations: list[tuple[dict[str, Any], tuple[ScoredGroup, ...]]],
) -> None:
    completions = [c for _, groups in iterations for scored in groups for c in scored.group.trajectories]
    cut = [c for c in completions if len(c.version_spans) > 1]

    assert cut
    for completion in completions:
        spans = completion.version_spans
        assert [spans[0].start, spans[-1].end] == [0, len(completion.token_ids)]
        assert all(a.end == b.start and a.version < b.version for a, b in itertools.pairwise(spans))


def test_no_prompt_is_trained_on_twice(iterations: list[tuple[dict[str, Any], tuple[ScoredGroup, ...]]]) -> None:
    trained = [scored.group.group_id for _, groups in iterations for scored in groups]

    assert len(set(trained)) == len(trained) == 8 * BATCH


def test_fresh_completions_are_exact_and_stale_ones_are_corrected(
    iterations: list[tuple[dict[str, Any], Any]],
) -> None:
    for result, _ in iterations:
        learner = result["learner"]
        # Absent where no completion was fresh from its first to its last token.
        assert learner.get("sampling_logprob_diff_max", 0.0) < 1e-3
        assert 0.0 < learner["effective_sample_size"] <= 1.0 + 1e-6
        assert math.isfinite(learner["policy_loss"])
    distances = {d for result, _ in iterations for d in result["learner"]["proximal_logprob_diff_by_staleness"]}
    assert distances > {"0"}


def test_the_timeline_shows_every_part(asynchronous: Algorithm, iterations: object) -> None:
    paths = sorted((asynchronous.run_dir / "timeline").iterdir())
    events = json.loads(paths[1].read_text())["traceEvents"]

    assert [path.name for path in paths] == [f"step_{number:06d}.json" for number in (2, 4, 6, 8)]
    lanes = sorted(event["args"]["name"] for event in events if event["ph"] == "M")
    assert lanes[:2] == ["algorithm", "learner 0"]
    assert len([lane for lane in lanes if lane.startswith("replica ")]) == 2
    names = {event["name"] for event in events}
    assert {"collect", "update", "optimizer steps", "publish"} <= names
    assert "reward worker 1" in lanes
    # Beside the update that follows it.
    assert "load version 3" in names


def test_evaluation_is_of_the_policy_as_it_is(asynchronous: Algorithm, iterations: object) -> None:
    assert asynchronous.evaluate() == asynchronous.evaluate()
    scored = [outcome for outcome in asynchronous.sample_evaluation() if isinstance(outcome, ScoredGroup)]
    spans = [span for group in scored for c in group.group.trajectories for span in c.version_spans]
    assert {span.version for span in spans} == {asynchronous.policy_version}
