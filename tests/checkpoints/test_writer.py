from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_ray.checkpoints.checkpoint import Checkpoint, CheckpointState
from rlhf_ray.checkpoints.folder import Folder, StoredFile
from rlhf_ray.checkpoints.writer import CheckpointWriter
from rlhf_ray.errors import DataError, LearnerError
from rlhf_ray.types import PromptPosition

STATE = CheckpointState(policy_version=3, iteration=3, time_total_s=1.0, prompt_position=PromptPosition(row=4))


class Learners:
    """Ranks that write when they are let."""

    def __init__(self) -> None:
        self.may_write = threading.Event()
        self.error: Exception | None = None
        self.copied = 0

    def save(self, folder: Folder) -> Callable[[], dict[str, StoredFile]]:
        self.copied += 1

        def wait() -> dict[str, StoredFile]:
            assert self.may_write.wait(10)
            if self.error is not None:
                raise self.error
            folder.write("shard", b"weights")
            return {"shard": StoredFile.of_bytes(b"weights")}

        return wait


@pytest.fixture
def learners() -> Learners:
    return Learners()


def test_training_continues_while_a_checkpoint_is_written(learners: Learners, tmp_path: Path) -> None:
    writer, checkpoint, after = CheckpointWriter(learners), Checkpoint(Folder.at(tmp_path / "c")), []

    writer.begin(checkpoint, config="a: 1\n", state=STATE, then=lambda: after.append(checkpoint.read()))

    assert learners.copied == 1
    assert writer.take_written() == []
    with pytest.raises(DataError):
        checkpoint.read()
    learners.may_write.set()
    writer.wait_pending()
    assert after == [STATE]
    assert writer.take_written() == [checkpoint]
    assert writer.take_written() == []


def test_one_checkpoint_is_written_at_a_time(learners: Learners, tmp_path: Path) -> None:
    writer = CheckpointWriter(learners)
    one, two = (Checkpoint(Folder.at(tmp_path / name)) for name in ("1", "2"))
    writer.begin(one, config="", state=STATE, then=lambda: None)
    threading.Timer(0.2, learners.may_write.set).start()

    writer.begin(two, config="", state=STATE, then=lambda: None)

    assert one.read() == STATE
    writer.stop()
    assert writer.take_written() == [one, two]


def test_a_checkpoint_that_cannot_be_written_is_counted_and_told(
    learners: Learners, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = CheckpointWriter(learners)
    learners.may_write.set()
    learners.error = LearnerError("no space left")

    writer.begin(Checkpoint(Folder.at(tmp_path / "c")), config="", state=STATE, then=lambda: None)
    writer.wait_pending()

    assert writer.failed == 1
    assert writer.take_written() == []
    assert "no space left" in caplog.text


def test_a_folder_that_cannot_be_made_is_counted_too(learners: Learners, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    writer = CheckpointWriter(learners)

    writer.begin(Checkpoint(Folder.at(tmp_path / "file" / "c")), config="", state=STATE, then=lambda: None)

    assert writer.failed == 1
    assert learners.copied == 0


def test_one_that_is_waited_for_raises(learners: Learners, tmp_path: Path) -> None:
    writer = CheckpointWriter(learners)
    learners.may_write.set()
    learners.error = LearnerError("no space left")

    with pytest.raises(LearnerError, match="no space left"):
        writer.write(Checkpoint(Folder.at(tmp_path / "c")), config="", state=STATE)

    assert writer.failed == 0
