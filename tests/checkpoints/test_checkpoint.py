from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_ray.checkpoints.checkpoint import Checkpoint, CheckpointState
from rlhf_ray.errors import DataError
from rlhf_ray.prompts.order import PromptPosition

POSITION = PromptPosition(epoch=2, row=17)


def write(folder: Path, *, iteration: int = 5, position: PromptPosition = POSITION) -> Checkpoint:
    """A whole checkpoint, as the Algorithm writes one."""
    checkpoint = Checkpoint(folder)
    checkpoint.begin()
    checkpoint.learner.mkdir()
    (checkpoint.learner / "shard.distcp").write_text(f"weights of {iteration}")
    checkpoint.commit(
        config="training: {lr: 1.0e-6}\n", policy_version=iteration + 1, iteration=iteration, prompt_position=position
    )
    return checkpoint


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    write(tmp_path / "runs" / "c")

    checkpoint = Checkpoint(tmp_path / "runs" / "c")
    assert checkpoint.read() == CheckpointState(policy_version=6, iteration=5, prompt_position=POSITION)
    assert checkpoint.config.read_text() == "training: {lr: 1.0e-6}\n"
    assert sorted(entry.name for entry in checkpoint.path.iterdir()) == ["config.yaml", "learner", "state.json"]


def test_a_write_that_ended_before_its_commit_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "c")
    checkpoint.begin()
    checkpoint.learner.mkdir()

    with pytest.raises(DataError, match=r"c holds no complete checkpoint: state\.json"):
        checkpoint.read()


def test_a_write_over_a_checkpoint_is_none_until_its_own_commit(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "c", iteration=1)

    checkpoint.begin()

    with pytest.raises(DataError):
        checkpoint.read()
    assert not checkpoint.learner.exists(), "shards of two checkpoints must not mix"
    assert write(tmp_path / "c", iteration=2).read().iteration == 2


@pytest.mark.parametrize("name", ["missing", "file"])
def test_a_path_that_is_no_folder_is_no_checkpoint(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(DataError, match="holds no complete checkpoint"):
        Checkpoint(tmp_path / name).read()


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    for iteration in (2, 10, 4, 8, 6):
        write(tmp_path / f"iteration_{iteration:06d}")

    Checkpoint.prune(tmp_path, keep=2)

    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["iteration_000008", "iteration_000010"]


@pytest.mark.parametrize("keep", [3, 7])
def test_pruning_fewer_than_are_kept_deletes_nothing(keep: int, tmp_path: Path) -> None:
    for iteration in (1, 2, 3):
        write(tmp_path / f"iteration_{iteration:06d}")

    Checkpoint.prune(tmp_path, keep=keep)

    assert len(list(tmp_path.iterdir())) == 3


def test_pruning_neither_counts_nor_deletes_what_is_not_complete(tmp_path: Path) -> None:
    for iteration in (1, 2):
        write(tmp_path / f"iteration_{iteration:06d}")
    Checkpoint(tmp_path / "iteration_000003").begin()
    (tmp_path / "notes").mkdir()

    Checkpoint.prune(tmp_path, keep=1)

    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["iteration_000002", "iteration_000003", "notes"]


def test_pruning_a_folder_that_is_not_there_is_nothing_to_do(tmp_path: Path) -> None:
    Checkpoint.prune(tmp_path / "none", keep=1)
