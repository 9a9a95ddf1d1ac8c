from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_ray.checkpoints.checkpoint import Checkpoint, CheckpointState
from rlhf_ray.checkpoints.folder import Folder, StoredFile
from rlhf_ray.errors import DataError
from rlhf_ray.types import PromptPosition

POSITION = PromptPosition(epoch=2, row=17, unfinished=(30, 34))
CONFIG = "training: {lr: 1.0e-6}\n"


def state_of(iteration: int) -> CheckpointState:
    return CheckpointState(
        policy_version=iteration + 1,
        iteration=iteration,
        time_total_s=2.5,
        prompt_position=POSITION,
        run_id="0123",
        metric="rollouts/reward_mean",
        score=0.25,
        counts={"group_retries": 3},
    )


def write(folder: Path, *, iteration: int = 5) -> Checkpoint:
    """A whole checkpoint, as a run writes one."""
    checkpoint = Checkpoint(Folder.at(folder))
    checkpoint.begin()
    shard = folder / "learner" / "shard-00001-model-00001-of-00001.safetensors"
    shard.write_bytes(f"weights of {iteration}".encode())
    checkpoint.commit(config=CONFIG, state=state_of(iteration), learner_files={shard.name: StoredFile.of(shard)})
    return checkpoint


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    write(tmp_path / "runs" / "c")

    checkpoint = Checkpoint(Folder.at(tmp_path / "runs" / "c"))
    assert checkpoint.read() == checkpoint.state() == state_of(5)
    assert checkpoint.config() == CONFIG
    assert sorted(entry.name for entry in (tmp_path / "runs" / "c").iterdir()) == [
        "config.yaml",
        "learner",
        "manifest.json",
    ]


def test_a_manifest_from_before_runs_had_ids_is_read(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "c")
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    del manifest["run_id"], manifest["metric"]
    (tmp_path / "c" / "manifest.json").write_text(json.dumps(manifest))

    assert checkpoint.read() == replace(state_of(5), run_id=None, metric=None)


def test_a_folder_is_committed_when_it_has_a_manifest(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "c")
    assert checkpoint.is_committed()
    checkpoint.begin()
    assert not checkpoint.is_committed()


def test_a_write_that_ended_before_its_commit_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoint = Checkpoint(Folder.at(tmp_path / "c"))
    checkpoint.begin()

    with pytest.raises(DataError, match=r"c holds no complete checkpoint: manifest\.json"):
        checkpoint.read()


def test_a_write_over_a_checkpoint_is_none_until_its_own_commit(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "c", iteration=1)

    checkpoint.begin()

    with pytest.raises(DataError):
        checkpoint.read()
    assert not list((tmp_path / "c" / "learner").iterdir()), "shards of two checkpoints must not mix"
    assert write(tmp_path / "c", iteration=2).read().iteration == 2


@pytest.mark.parametrize("name", ["missing", "file"])
def test_a_path_that_is_no_folder_is_no_checkpoint(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(DataError, match="holds no complete checkpoint"):
        Checkpoint(Folder.at(tmp_path / name)).read()


def test_a_checkpoint_whose_files_are_cut_anywhere_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "whole")
    names = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()]
    assert len(names) == 3
    for name in names:
        content = (tmp_path / "whole" / name).read_bytes()
        for length in range(len(content)):
            shutil.rmtree(tmp_path / "cut", ignore_errors=True)
            shutil.copytree(tmp_path / "whole", tmp_path / "cut")
            (tmp_path / "cut" / name).write_bytes(content[:length])
            with pytest.raises(DataError, match="holds no complete checkpoint"):
                Checkpoint(Folder.at(tmp_path / "cut")).read()


def test_an_altered_byte_is_found(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "c")
    (shard,) = (tmp_path / "c" / "learner").iterdir()
    content = bytearray(shard.read_bytes())
    content[3] ^= 1
    shard.write_bytes(content)

    with pytest.raises(DataError, match=r"learner/shard-\S+ is missing, cut short or altered"):
        checkpoint.read()


@pytest.mark.parametrize(
    "manifest",
    [b"[]", b"{}", b"null", b'{"format": 2}', b'{"format": 1}', b'{"format": 1, "files": [], "prompt_position": {}}'],
)
def test_another_manifest_is_refused_by_name(manifest: bytes, tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "c")
    (tmp_path / "c" / "manifest.json").write_bytes(manifest)

    with pytest.raises(DataError, match=r"manifest\.json is not of format 1"):
        checkpoint.read()


def test_a_learner_whose_files_are_elsewhere_is_an_error_at_the_commit(tmp_path: Path) -> None:
    checkpoint = Checkpoint(Folder.at(tmp_path / "c"))
    checkpoint.begin()

    with pytest.raises(DataError, match="Name a shared folder"):
        checkpoint.commit(
            config=CONFIG, state=state_of(1), learner_files={"shard-00002": StoredFile(size_bytes=3, crc32=1)}
        )
    with pytest.raises(DataError):
        checkpoint.read()
