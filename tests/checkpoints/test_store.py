from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_ray.checkpoints.checkpoint import Checkpoint, CheckpointState
from rlhf_ray.checkpoints.folder import Folder
from rlhf_ray.checkpoints.store import CheckpointStore
from rlhf_ray.prompts.order import PromptPosition

STATE = CheckpointState(policy_version=1, iteration=1, time_total_s=0.0, prompt_position=PromptPosition())


def store_of(folder: Path, *iterations: int, scores: dict[int, float] | None = None) -> CheckpointStore:
    store = CheckpointStore(Folder.at(folder))
    for iteration in iterations:
        checkpoint = store.of_iteration(iteration)
        checkpoint.begin()
        score = None if scores is None else scores.get(iteration)
        checkpoint.commit(config="", state=replace(STATE, iteration=iteration, score=score), learner_files={})
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


def test_pruning_neither_counts_nor_deletes_what_is_not_complete(tmp_path: Path) -> None:
    store = store_of(tmp_path, 1, 2)
    store.of_iteration(3).begin()
    (tmp_path / "notes").mkdir()

    store.prune(keep=1, keep_best=1, highest_is_best=True)

    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["iteration_000002", "iteration_000003", "notes"]
    assert Checkpoint(Folder.at(tmp_path / "iteration_000002")).read().iteration == 2


def test_pruning_a_folder_that_is_not_there_is_nothing_to_do(tmp_path: Path) -> None:
    CheckpointStore(Folder.at(tmp_path / "none")).prune(keep=1, keep_best=1, highest_is_best=True)
