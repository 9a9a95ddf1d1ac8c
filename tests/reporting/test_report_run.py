from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from report_runs import iteration, iterations, write_run

from rlhf_ray.errors import ConfigError
from rlhf_ray.reporting.report.run import read_run


def test_settings_by_name_and_a_row_per_iteration(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    assert run.settings["training.lr"] == 2e-4
    assert run.settings["algorithm"] == "PPO"
    assert run.settings["training.iterations"] == 5
    assert [row["training_iteration"] for row in run.rows] == [1, 2, 3, 4, 5]
    assert run.rows[4]["rollouts/reward_mean"] == 0.5
    assert run.notes == ()


def test_numbers_that_are_none_are_missing(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", results=[iteration(1, value_loss=math.nan)])
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"training_iteration": 2, "learner/entropy": Infinity}\n')
    run = read_run(path)
    assert run.rows[0]["learner/value_loss"] is None
    assert run.rows[1]["learner/entropy"] is None


def test_a_torn_last_line_is_left_out_and_said(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    whole = (path / "metrics.jsonl").read_bytes()
    (path / "metrics.jsonl").write_bytes(whole[:-40])
    run = read_run(path)
    assert [row["training_iteration"] for row in run.rows] == [1, 2, 3, 4]
    assert run.notes == ("The last line of metrics.jsonl is torn: it was being written, or the run was cut.",)


def test_damaged_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    lines = (path / "metrics.jsonl").read_bytes().splitlines()
    damaged = [lines[0], b"\xff\xfe", b"[1]", b'{"training_iteration": "one"}', *lines[1:]]
    (path / "metrics.jsonl").write_bytes(b"\n".join(damaged) + b"\n")
    run = read_run(path)
    assert len(run.rows) == 5
    assert run.notes == ("3 damaged lines of metrics.jsonl are left out.",)


def test_what_a_run_had_reported_before_it_went_back_is_no_part_of_it(tmp_path: Path) -> None:
    again = [iteration(number, approx_kl=7.0) for number in (3, 4)]
    run = read_run(write_run(tmp_path / "run", results=[*iterations(6), *again]))
    assert [row["training_iteration"] for row in run.rows] == [1, 2, 3, 4]
    assert [row["learner/approx_kl"] for row in run.rows] == [0.001, 0.002, 7.0, 7.0]


@pytest.mark.parametrize(
    ("text", "note"),
    [
        (None, "There is no config.yaml, so no settings."),
        ("training: {lr: 1", "config.yaml cannot be read as YAML, so there are no settings."),
        ("- 1\n", "config.yaml holds no settings."),
        ("\xff".encode("latin-1"), "config.yaml cannot be read as YAML, so there are no settings."),
    ],
)
def test_settings_that_cannot_be_read_cost_the_settings_alone(
    tmp_path: Path, text: str | bytes | None, note: str
) -> None:
    path = write_run(tmp_path / "run")
    (path / "config.yaml").unlink()
    if text is not None:
        (path / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    run = read_run(path)
    assert (run.settings, run.notes) == ({}, (note,))
    assert len(run.rows) == 5


def test_a_run_that_has_not_finished_an_iteration(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", results=[])
    assert read_run(path).notes == ("The run has not finished an iteration.",)
    (path / "metrics.jsonl").unlink()
    run = read_run(path)
    assert run.rows == []
    assert run.notes == ("There is no metrics.jsonl: the run has not finished an iteration.",)


def test_a_key_that_is_no_number_stays_what_it_is(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", results=[])
    (path / "metrics.jsonl").write_text(json.dumps({"training_iteration": 1, "note": "x"}) + "\n")
    assert read_run(path).rows == [{"training_iteration": 1, "note": "x"}]


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"RUN_DIR = .*holds no run \(neither metrics\.jsonl nor config\.yaml\)"):
        read_run(tmp_path)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder; name the folder of a run"):
        read_run(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="it is a file; name the folder that it is in"):
        read_run(tmp_path / "file")


def test_a_folder_is_known_by_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_run(tmp_path / "run"))
    assert read_run(".").directory.name == "run"
