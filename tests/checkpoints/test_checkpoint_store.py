from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.checkpoints.checkpoint import Checkpoint, CheckpointState, CheckpointStore
from rlhf_ray.checkpoints.folder import Folder
from rlhf_ray.types import PromptPosition

STATE = CheckpointState(policy_version=1, iteration=1, time_total_s=0.0, prompt_position=PromptPosition())


def write(checkpoint: Checkpoint, **state: Any) -> None:
    checkpoint.begin()
    checkpoint.commit(config="", state=replace(STATE, **state), learner_files={})


def store_of(folder: Path, *iterations: int, scores: dict[int, float] | None = None, **state: Any) -> CheckpointStore:
    store = CheckpointStore(Folder.at(folder), run_id=state.get("run_id"))
    for iteration in iterations:
        score = None if scores is None else scores.get(iteration)
        write(store.of_iteration(iteration), iteration=iteration, score=score, **state)
    return store


def names(folder: Path) -> list[int]:
    return sorted(int(entry.name.removeprefix("iteration_")) for entry in folder.iterdir())


def test_the_newest_is_found(tmp_path: Path) -> None:
    newest = store_of(tmp_path, 2, 10, 4).newest()

    assert newest is not None
    assert newest.read().iteration == 10


def test_where_the_newest_is_torn_the_one_before_it_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = store_of(tmp_path, 1, 2, 3)
    store.of_iteration(4).begin()
    manifest = tmp_path / "iteration_000003" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-1])

    with caplog.at_level(logging.WARNING):
        newest = store.newest()

    assert newest is not None
    assert newest.read().iteration == 2
    assert "iteration_000004" in caplog.text
    assert "iteration_000003" in caplog.text


def test_a_store_without_checkpoints_has_no_newest(tmp_path: Path) -> None:
    assert CheckpointStore(Folder.at(tmp_path / "none")).newest() is None


@pytest.mark.parametrize(("keep", "kept"), [(1, [10]), (2, [8, 10]), (5, [2, 4, 6, 8, 10]), (7, [2, 4, 6, 8, 10])])
def test_pruning_keeps_the_newest(keep: int, kept: list[int], tmp_path: Path) -> None:
    store_of(tmp_path, 2, 10, 4, 8, 6).prune(keep=keep, keep_best=1, highest_is_best=True)

    assert names(tmp_path) == kept


@pytest.mark.parametrize(
    ("highest", "keep_best", "kept"), [(True, 1, [2, 5]), (True, 2, [2, 4, 5]), (False, 1, [3, 5])]
)
def test_pruning_keeps_the_best_too(highest: bool, keep_best: int, kept: list[int], tmp_path: Path) -> None:
    store = store_of(tmp_path, 1, 2, 3, 4, 5, scores={2: 0.9, 3: 0.1, 4: 0.8, 5: 0.3})

    store.prune(keep=1, keep_best=keep_best, highest_is_best=highest)

    assert names(tmp_path) == kept


def test_what_was_never_finished_is_not_counted_and_goes(tmp_path: Path) -> None:
    store = store_of(tmp_path, 1, 2)
    for iteration in (0, 3):
        store.of_iteration(iteration).begin()
        (tmp_path / f"iteration_{iteration:06d}" / "learner" / "shard").write_text("half of one")
    (tmp_path / "notes").mkdir()

    store.prune(keep=1, keep_best=1, highest_is_best=True)

    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["iteration_000002", "notes"]
    assert Checkpoint(Folder.at(tmp_path / "iteration_000002")).read().iteration == 2


def test_a_manifest_that_cannot_be_read_is_no_reason_to_delete(tmp_path: Path) -> None:
    store = store_of(tmp_path, 1, 2)
    (tmp_path / "iteration_000001" / "manifest.json").write_text('{"format": 2}')

    store.prune(keep=1, keep_best=1, highest_is_best=True)

    assert names(tmp_path) == [1, 2]


def test_where_others_write_too_nothing_unfinished_is_deleted(tmp_path: Path) -> None:
    store = replace(store_of(tmp_path, 1, 2), is_own=False)
    store.of_iteration(3).begin()

    store.prune(keep=1, keep_best=1, highest_is_best=True)

    assert names(tmp_path) == [2, 3]


def test_a_run_sees_its_own_checkpoints_and_those_from_before_ids(tmp_path: Path) -> None:
    store = store_of(tmp_path, 1, 2)
    own = store_of(tmp_path, 3, 4, run_id="own")
    other = store_of(tmp_path, 5, 6, run_id="other", scores={5: 1.0})

    assert own.newest() == own.of_iteration(4)
    assert (other.newest(), store.newest()) == (other.of_iteration(6), other.of_iteration(6))
    own.prune(keep=1, keep_best=1, highest_is_best=True)
    assert names(tmp_path) == [4, 5, 6]


def test_a_place_with_any_checkpoint_is_taken(tmp_path: Path) -> None:
    own = CheckpointStore(Folder.at(tmp_path), run_id="own")
    own.of_iteration(1).begin()
    assert not own.is_taken()
    store_of(tmp_path, 5, run_id="other")
    assert own.is_taken()


def test_a_folder_of_another_name_is_the_users(tmp_path: Path) -> None:
    store = store_of(tmp_path, 1, 2)
    for name in ("manual", "iteration_000002.bak", "iteration_best"):
        write(Checkpoint(store.folder / name), iteration=9)

    assert store.newest() == store.of_iteration(2)
    store.prune(keep=1, keep_best=1, highest_is_best=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "iteration_000002",
        "iteration_000002.bak",
        "iteration_best",
        "manual",
    ]


def test_the_newest_is_that_of_the_last_iteration_whatever_its_name(tmp_path: Path) -> None:
    store = store_of(tmp_path, 999_999, 1_000_000)

    assert store.newest() == store.of_iteration(1_000_000)
    store.prune(keep=1, keep_best=1, highest_is_best=True)
    assert names(tmp_path) == [1_000_000]


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("highest", [True, False])
def test_a_score_that_is_no_number_is_never_the_best(wrong: float, highest: bool, tmp_path: Path) -> None:
    store = store_of(tmp_path, 1, 2, 3, scores={1: wrong, 2: 0.5})

    store.prune(keep=1, keep_best=1, highest_is_best=highest)

    assert names(tmp_path) == [2, 3]


def test_scores_of_another_metric_are_not_compared(tmp_path: Path) -> None:
    store_of(tmp_path, 1, 2, scores={1: 900.0, 2: 800.0}, metric="rollouts/completion_tokens_mean")
    store_of(tmp_path, 3, 4, scores={3: 7.0, 4: 8.0})  # From before the name was kept.
    store = store_of(tmp_path, 5, 6, 7, scores={5: 0.9, 6: 0.8}, metric="evaluation/x/reward_mean")

    store.prune(keep=1, keep_best=1, highest_is_best=True, metric="evaluation/x/reward_mean")

    assert names(tmp_path) == [4, 5, 7]


def test_pruning_a_folder_that_is_not_there_is_nothing_to_do(tmp_path: Path) -> None:
    CheckpointStore(Folder.at(tmp_path / "none")).prune(keep=1, keep_best=1, highest_is_best=True)
