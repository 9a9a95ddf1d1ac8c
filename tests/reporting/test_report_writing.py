from __future__ import annotations

import os
from pathlib import Path

import pytest
from report_runs import iteration, write_run

from rlhf_ray.config.settings import Settings
from rlhf_ray.errors import ConfigError
from rlhf_ray.reporting import RunDirectory, flatten
from rlhf_ray.reporting.jsonl import JsonlReporter
from rlhf_ray.reporting.report import write_report


def test_the_page_of_one_run_lies_in_its_folder(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    assert write_report([path]) == path / "report.html"
    text = (path / "report.html").read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert "<title>run - rlhf_ray</title>" in text
    assert sorted(file.name for file in path.iterdir()) == [
        "completions",
        "config.yaml",
        "metrics.jsonl",
        "report.html",
    ]


def test_the_page_of_several_runs_lies_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [write_run(tmp_path / name) for name in ("a", "b")]
    monkeypatch.chdir(tmp_path)
    assert write_report(paths) == tmp_path / "report.html"
    assert "<title>a, b - rlhf_ray</title>" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_page_of_a_run_under_way_is_written_again(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    before = write_report([path]).read_text(encoding="utf-8")
    metrics = JsonlReporter(Settings(), RunDirectory.reopen(str(path)))
    metrics.report(flatten(iteration(6)))
    metrics.stop()
    after = write_report([path]).read_text(encoding="utf-8")
    assert '"iteration":[1,2,3,4,5]' in before
    assert '"iteration":[1,2,3,4,5,6]' in after


def test_a_named_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert write_report([path], output="page.html") == tmp_path / "page.html"
    assert not (path / "report.html").exists()


def test_completions_can_be_left_out(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    assert "20+22=" in write_report([path]).read_text(encoding="utf-8")
    assert "20+22=" not in write_report([path], completions=0).read_text(encoding="utf-8")


@pytest.mark.parametrize("again", ["run", "./run", "link"])
def test_a_run_that_is_named_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: str) -> None:
    write_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    os.symlink("run", "link")
    with pytest.raises(ConfigError, match=f"RUN_DIR = '{again}': this run is named twice"):
        write_report(["run", again])


def test_no_run() -> None:
    with pytest.raises(ConfigError, match="RUN_DIR = None: name the folder of a run"):
        write_report([])


def test_fewer_than_no_completions(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--completions = -1: name a number of iterations"):
        write_report([write_run(tmp_path / "run")], completions=-1)


def test_a_folder_in_place_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--output = .*it is a folder; name a file, for example .*/report\.html"):
        write_report([write_run(tmp_path / "run")], output=tmp_path)


def test_a_place_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be written \(No such file or directory\); choose another place"):
        write_report([write_run(tmp_path / "run")], output=tmp_path / "nowhere" / "page.html")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be written \(Not a directory\)"):
        write_report([write_run(tmp_path / "other")], output=tmp_path / "file" / "page.html")
