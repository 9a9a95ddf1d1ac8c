from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from rlhf_ray.errors import ConfigError
from rlhf_ray.reporting.run_directory import RunDirectory, ray_name


def test_the_default_name_says_algorithm_and_time(tmp_path: Path) -> None:
    directory = RunDirectory.create(None, algorithm="PPO", parent=tmp_path / "runs")
    assert re.fullmatch(r"PPO-\d{8}-\d{6}(-\d+)?", directory.name)
    assert directory.path.is_dir()


def test_runs_started_in_the_same_second_get_folders_of_their_own(tmp_path: Path) -> None:
    directories = [RunDirectory.create(None, algorithm="PPO", parent=tmp_path) for _ in range(3)]
    assert len({directory.path for directory in directories}) == 3


def test_the_path_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert RunDirectory.create("here", algorithm="PPO").path == tmp_path / "here"
    assert RunDirectory.create(None, algorithm="PPO").path.parent == tmp_path / "runs"


@pytest.mark.parametrize("trace", ["config.yaml", "metrics.jsonl", "checkpoints/iteration_000001/manifest.json"])
def test_a_folder_that_holds_a_run_is_refused(tmp_path: Path, trace: str) -> None:
    (tmp_path / trace).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / trace).write_text("{}\n")
    with pytest.raises(ConfigError, match="choose another") as caught:
        RunDirectory.create(str(tmp_path), algorithm="PPO")
    assert caught.value.field == "reporting.run_dir"


def test_a_start_that_reported_nothing_leaves_the_folder_free(tmp_path: Path) -> None:
    directory = RunDirectory.create(str(tmp_path), algorithm="PPO")
    directory.run_id()
    directory.write_config("algorithm: PPO\n")
    directory.metrics.touch()
    (directory.checkpoints / "iteration_000001").mkdir(parents=True)
    assert RunDirectory.create(str(tmp_path), algorithm="PPO") == directory


NAMES = [
    "läuft",
    "lauft",
    "two words",
    "#?%",
    "100%",
    "\N{ROCKET}\N{ROCKET}",
    "\N{ROCKET}",
    "x" * 200,
    "x" * 201,
    "é" * 200,
    "..hidden",
    "--flag",
    "_private",
    "実験",
    "実験2",
    "line\nbreak",
    "v1.2",
    "a/b",
    "",
    "\udcff",
    "İ",
]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_becomes_an_identifier_of_ray_s(name: str) -> None:
    found = ray_name(name)
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", found)
    assert found == ray_name(name)


def test_different_names_stay_different_and_plain_ones_are_kept() -> None:
    assert len({ray_name(name) for name in NAMES}) == len(NAMES)
    assert ray_name("ppo-20260101-120000") == "ppo-20260101-120000"
    assert RunDirectory.at("runs/läuft").ray_name == RunDirectory.at("/other/läuft").ray_name == ray_name("läuft")
    assert ray_name("läuft").startswith("lauft-")


def test_a_folder_with_other_things_is_taken(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    assert RunDirectory.create(str(tmp_path), algorithm="PPO").path == tmp_path


def test_a_place_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="writable"):
        RunDirectory.create(str(tmp_path / "file" / "run"), algorithm="PPO")
    with pytest.raises(ConfigError, match="writable"):
        RunDirectory.create(None, algorithm="PPO", parent=tmp_path / "file")


def test_an_address_is_refused() -> None:
    with pytest.raises(ConfigError, match="folder of this machine"):
        RunDirectory.create("s3://bucket/run", algorithm="PPO")


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunDirectory.create(os.path.join("~", "run"), algorithm="PPO").path == tmp_path / "run"


def test_a_run_keeps_its_id(tmp_path: Path) -> None:
    one, other = (RunDirectory.create(str(tmp_path / name), algorithm="PPO") for name in ("one", "other"))
    assert one.run_id() == RunDirectory.reopen(one.path).run_id() != other.run_id()
    one.path.rename(tmp_path / "renamed")
    assert RunDirectory.reopen(tmp_path / "renamed").run_id() != other.run_id()
    assert not RunDirectory.holds_a_run(str(other.path)), "an id alone is no run"


def test_what_later_iterations_left_goes(tmp_path: Path) -> None:
    directory = RunDirectory.at(tmp_path)
    directory.metrics.write_text('{"training_iteration": 1}\n{"training_iteration": 2}\n{"training_it')
    for folder, ending in ((directory.completions, "parquet"), (directory.timeline, "json")):
        folder.mkdir()
        for number in (1, 2, 3):
            (folder / f"step_{number:06d}.{ending}").touch()

    directory.truncate_after(1)

    assert directory.metrics.read_text() == '{"training_iteration": 1}\n'
    for folder in (directory.completions, directory.timeline):
        assert [path.stem for path in folder.iterdir()] == ["step_000001"]


def test_what_was_reported_is_set_aside(tmp_path: Path) -> None:
    directory = RunDirectory.at(tmp_path)
    assert directory.archive() is None
    for number in (1, 2):
        directory.metrics.write_text(f"{number}\n")
        directory.completions.mkdir()
        (directory.completions / "step_000001.parquet").write_text(str(number))
        assert directory.archive() == tmp_path / f"before-{number}"
    directory.metrics.touch()
    assert directory.archive() is None
    assert (tmp_path / "before-1" / "metrics.jsonl").read_text() == "1\n"
    assert (tmp_path / "before-2" / "completions" / "step_000001.parquet").read_text() == "2"
    assert not directory.completions.exists()


def test_a_configuration_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = RunDirectory.at(tmp_path)
    directory.write_config("algorithm: PPO\n")

    def cut(path: Path, text: str, **_: object) -> None:
        with path.open("w") as file:
            file.write(text[:3])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", cut)
    with pytest.raises(OSError, match="disk full"):
        directory.write_config("algorithm: GRPO\n")
    assert directory.config.read_text() == "algorithm: PPO\n"


def test_reopen_takes_a_run_and_refuses_what_is_not_there(tmp_path: Path) -> None:
    made = RunDirectory.create(str(tmp_path / "run"), algorithm="PPO")
    made.write_config("algorithm: PPO\n")
    again = RunDirectory.reopen(made.path)
    assert again == made
    assert again.config.read_text() == "algorithm: PPO\n"
    with pytest.raises(ConfigError, match="no such folder"):
        RunDirectory.reopen(tmp_path / "other")
