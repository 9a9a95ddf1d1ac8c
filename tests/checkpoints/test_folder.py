from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from rlhf_ray.checkpoints.folder import Folder, StoredFile
from rlhf_ray.errors import ConfigError


@pytest.fixture(params=["local", "remote"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Folder]:
    """On this machine, and behind a URI of a file system that has nothing but pyarrow's calls."""
    if request.param == "local":
        yield Folder.at(tmp_path / "store" / "c")
        return
    memory = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    monkeypatch.setattr(Folder, "_opened", lambda self: (memory, self.location.removeprefix("bucket://")), raising=True)
    yield Folder.at("bucket://store/c")


def test_files_are_written_whole_and_read_back(folder: Folder) -> None:
    folder.make()
    folder.write("a.txt", b"first")
    folder.write("a.txt", b"second")

    assert folder.read("a.txt") == b"second"
    assert folder.files() == ["a.txt"]
    assert folder.holds("a.txt", StoredFile.of_bytes(b"second"))
    assert not folder.holds("a.txt", StoredFile.of_bytes(b"first"))
    assert not folder.holds("b.txt", StoredFile.of_bytes(b""))


def test_files_travel_both_ways(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(bytes(range(256)) * 40)
    folder.make()

    folder.upload(tmp_path / "shard")
    folder.download("shard", tmp_path / "back")

    assert (tmp_path / "back").read_bytes() == (tmp_path / "shard").read_bytes()
    assert folder.holds("shard", StoredFile.of(tmp_path / "shard"))


def test_folders_are_listed_by_name_and_deleted_with_all_in_them(folder: Folder) -> None:
    for name in ("b", "a"):
        (folder / name).make()
        (folder / name).write("x", b"1")
    folder.write("file", b"")

    assert [found.name for found in folder.folders()] == ["a", "b"]
    (folder / "a").delete()
    (folder / "a").delete()
    assert [found.name for found in folder.folders()] == ["b"]


def test_what_is_not_there_has_no_folders_and_loses_nothing(folder: Folder) -> None:
    assert (folder / "none").folders() == []
    (folder / "none").delete()
    (folder / "none").delete_file("x")


def test_text_names_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    assert Folder.at("c") == Folder.at(tmp_path / "c") == Folder.at(f"file://{tmp_path}/c") == Folder.at("~/c")
    assert Folder.at("c").local == tmp_path / "c"
    assert Folder.at("s3://bucket/c/").local is None
    assert str(Folder.at("s3://bucket/c/") / "d") == "s3://bucket/c/d"


def test_options_of_a_uri_stay_at_its_end() -> None:
    folder = Folder.at("s3://bucket/c/?endpoint_override=http://minio:9000&scheme=http")
    inner = folder / "d" / "e"

    assert str(inner) == "s3://bucket/c/d/e?endpoint_override=http://minio:9000&scheme=http"
    assert (folder.name, inner.name) == ("c", "e")
    assert Folder.at(str(inner)) == inner
    assert Folder.at("/c?d").name == "c?d"


def test_pyarrow_finds_the_folder_of_a_uri_with_options() -> None:
    uri = "s3://bucket/c?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1"
    assert (Folder.at(uri) / "d")._opened()[1] == "bucket/c/d"


def test_a_folder_that_is_tried_out_is_left_as_it_was(folder: Folder) -> None:
    folder.try_out()

    assert folder.files() == []


def test_a_place_that_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"checkpointing\.path = '.*/file/c': checkpoints cannot be written there"):
        Folder.at(tmp_path / "file" / "c").try_out()
    with pytest.raises(ConfigError, match="pyarrow cannot open it"):
        Folder.at("nosuch://x/y").try_out()


@pytest.mark.parametrize("error", [OSError("ACCESS_DENIED"), NotImplementedError("no S3"), ValueError("bad bucket")])
def test_a_place_that_cannot_be_written_to_is_named(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(Folder, "write", refuse)
    with pytest.raises(ConfigError, match=str(error)):
        Folder.at(tmp_path).try_out()


def test_a_scheme_that_pyarrow_does_not_know_is_named() -> None:
    with pytest.raises(ConfigError, match=r"checkpointing\.path = 'nosuch://x/y': pyarrow cannot open it"):
        Folder.at("nosuch://x/y").make()


def test_a_stored_file_measures_bytes_and_files_alike(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"123456789")

    # The check value of CRC-32/ISO-HDLC.
    assert (
        StoredFile.of(tmp_path / "f") == StoredFile.of_bytes(b"123456789") == StoredFile(size_bytes=9, crc32=0xCBF43926)
    )
