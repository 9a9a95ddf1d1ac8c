"""Sequences in slices against whole ones, on a tiny model: ranks in processes of their own, and one rank here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import learner_scenarios as runs
import pytest
import sequence_parallel_ranks as ranks
import torch
from learner_scenarios import RESUMED, SCENARIOS, Outcome
from model_families import tiny_config
from sequence_parallel_ranks import NAMES, NOT_SLICED, ON_FOUR_RANKS, SCORED, SlicedResult

from rlhf_ray.learner.learner import Learner
from rlhf_ray.learner.remote.commands import merge_results

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(scope="module")
def folder(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of all runs."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("sliced")
    for name in ("policy", "critic"):
        (folder / name).symlink_to(models / name)
    torch.manual_seed(3)
    config = AutoConfig.from_pretrained(models / "policy", num_key_value_heads=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "one_kv_head")
    for family in NOT_SLICED:
        AutoModelForCausalLM.from_config(tiny_config(family)).save_pretrained(folder / family)
    return folder


def start(folder: Path, into: Path, world_size: int, size: int) -> list[SlicedResult]:
    """What each of some ranks leaves behind."""
    for model in folder.iterdir():
        (into / model.name).symlink_to(model)
    runs.run_ranks(ranks.__file__, into, world_size, size)
    return [torch.load(into / f"rank{rank}.pt", weights_only=False) for rank in range(world_size)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("on_two_ranks")


@pytest.fixture(scope="module")
def on_two(folder: Path, checkpoints: Path) -> list[SlicedResult]:
    """Two ranks that read the same sequences."""
    return start(folder, checkpoints, 2, 2)


@pytest.fixture(scope="module")
def whole_scores(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {name: ranks.scored(folder, name, 1) for name in SCORED}


def assert_same(outcome: Outcome, wanted: Outcome, tolerance: float = 1e-6) -> None:
    for mine, theirs in ((outcome.policy, wanted.policy), (outcome.critic, wanted.critic)):
        assert mine.keys() == theirs.keys()
        assert max((float((mine[name] - theirs[name]).abs().max()) for name in theirs), default=0.0) <= tolerance
    for mine, theirs in zip(map(without_times, outcome.figures), map(without_times, wanted.figures), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def without_times(figures: dict[str, float]) -> dict[str, float]:
    return runs.without_wall_times([figures])[0]


@pytest.mark.parametrize("name", SCORED)
def test_scores_in_slices_are_bit_for_bit_those_of_whole_sequences(
    name: str, on_two: list[SlicedResult], whole_scores: dict[str, Any]
) -> None:
    for result in on_two:
        for mine, theirs in zip(result.scores[name], whole_scores[name], strict=True):
            assert theirs.abs().min() > 0.0
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_with_a_slice_each_learn_what_one_rank_does(
    name: str, on_two: list[SlicedResult], on_one_rank: Callable[[str], Outcome]
) -> None:
    first, second = (result.outcomes[name] for result in on_two)
    assert_same(first, on_one_rank(name))
    assert without_times(first.figures[-1]) == without_times(second.figures[-1])
    answers = merge_results([first.last], [first.sequences])
    wanted = merge_results([on_one_rank(name).last], [on_one_rank(name).sequences])
    assert answers.estimates is not None
    assert wanted.estimates is not None
    for mine, theirs in zip(answers.estimates, wanted.estimates, strict=True):
        assert mine.advantages == pytest.approx(theirs.advantages, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_four_ranks_learn_what_one_rank_does(
    size: int,
    folder: Path,
    tmp_path: Path,
    on_one_rank: Callable[[str], Outcome],
    whole_scores: dict[str, Any],
) -> None:
    """Two shares of the batch in two slices each, or one in four, which are more than there are key heads."""
    results = start(folder, tmp_path, 4, size)
    for name in ON_FOUR_RANKS:
        for result in results:
            assert_same(result.outcomes[name], on_one_rank(name))
        shares = [result.outcomes[name] for result in results[::size]]
        merged = merge_results([share.last for share in shares], [share.sequences for share in shares])
        assert merged.estimates is not None
        assert len(merged.estimates) == SCENARIOS[name].num_sequences
    for name in SCORED:
        for mine, theirs in zip(results[-1].scores[name], whole_scores[name], strict=True):
            torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=0.0)


def test_a_run_that_was_saved_in_slices_goes_on_with_whole_sequences(
    on_two: list[SlicedResult], checkpoints: Path, folder: Path
) -> None:
    wanted = runs.run(RESUMED, folder)
    learner = Learner(runs.make_spec(folder, RESUMED))
    published = [pieces for _, pieces in learner.weight_buckets()]
    for mine, theirs in zip(on_two[0].buckets, published, strict=True):
        assert mine is not None
        assert theirs is not None
        assert b"".join(piece.tobytes() for piece in mine) == b"".join(piece.tobytes() for piece in theirs)
    assert set(on_two[1].buckets) == {None}

    learner.load(str(checkpoints / "checkpoint"))
    figures = [runs.update(learner, RESUMED, number) for number in (1, 2)]

    assert_same(runs.outcome_of(learner, RESUMED, figures), replace(wanted, figures=wanted.figures[1:]))


def test_both_ranks_refuse_what_is_not_finite(on_two: list[SlicedResult]) -> None:
    assert on_two[0].refusal == on_two[1].refusal
    assert "rewards not finite, first in sequence 3 of the batch" in on_two[0].refusal


@pytest.mark.parametrize(("family", "reason"), [("lfm2", "its hidden states differ by"), ("codegen", "RuntimeError")])
def test_a_model_that_computes_something_else_in_slices_is_refused(
    family: str, reason: str, on_two: list[SlicedResult]
) -> None:
    for result in on_two:
        assert result.not_sliced[family].startswith("learners.sequence_parallel = 2: model.path: ")
        assert reason in result.not_sliced[family]
        assert result.not_sliced[family].endswith("; use 1")
