from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from rlhf_ray import ConfigError
from rlhf_ray.checkpoints.folder import Folder
from rlhf_ray.tune.storage import folder_to_read, folder_to_write


def nodes(monkeypatch: pytest.MonkeyPatch, alive: int) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}] * alive + [{"Alive": False}])


def storage(path: Path, file_system: str = "local") -> Any:
    return SimpleNamespace(storage_filesystem=SimpleNamespace(type_name=file_system), trial_fs_path=str(path))


def fill(folder: Path) -> None:
    (folder / "learner").mkdir(parents=True)
    (folder / "learner" / "shard").write_text("weights")
    (folder / "state.json").write_text("{}")


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_on_one_node_and_outside_of_tune_tunes_folder_will_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nodes(monkeypatch, 1)
    for place in (storage(tmp_path / "storage"), None):
        with folder_to_write(str(tmp_path / "given"), place) as folder:
            assert folder.local == tmp_path / "given"
        with folder_to_read(str(tmp_path / "given"), place) as folder:
            assert folder.local == tmp_path / "given"


def test_between_nodes_a_folder_of_the_storage_stands_for_a_while(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nodes(monkeypatch, 2)
    place, given = storage(tmp_path / "storage"), tmp_path / "given"
    with folder_to_write(str(given), place) as folder:
        assert folder.local is not None
        assert folder.local.parent == tmp_path / "storage"
        fill(folder.local)
    assert files(given) == ["learner/shard", "state.json"]
    with folder_to_read(str(given), place) as folder:
        assert folder.local is not None
        assert files(folder.local) == ["learner/shard", "state.json"]
    assert list((tmp_path / "storage").iterdir()) == []


def test_nothing_stays_in_the_storage_when_the_save_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nodes(monkeypatch, 2)
    with (
        pytest.raises(OSError, match="disk"),
        folder_to_write(str(tmp_path / "given"), storage(tmp_path / "storage")) as folder,
    ):
        assert folder.local is not None
        fill(folder.local)
        raise OSError("disk full")
    assert files(tmp_path) == []


def test_a_folder_that_cannot_be_deleted_hides_no_failure_of_the_save(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(folder: Folder) -> None:
        raise PermissionError("it stays")

    nodes(monkeypatch, 2)
    monkeypatch.setattr(Folder, "delete", refuse)
    with (
        pytest.raises(OSError, match="disk full"),
        folder_to_write(str(tmp_path / "given"), storage(tmp_path / "storage")),
    ):
        raise OSError("disk full")


@pytest.mark.parametrize(("file_system", "scheme"), [("s3", "s3"), ("gcs", "gs"), ("hdfs", "hdfs")])
def test_a_remote_storage_is_named_by_its_uri(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file_system: str, scheme: str
) -> None:
    from rlhf_ray.tune.storage import _location

    assert _location(storage(Path("bucket/sweep/trial"), file_system)) == f"{scheme}://bucket/sweep/trial"


def test_a_storage_that_learners_cannot_open_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nodes(monkeypatch, 2)
    place = storage(tmp_path, "py::fsspec+memory")
    with pytest.raises(ConfigError, match="storage_path"), folder_to_write(str(tmp_path), place):
        pass
