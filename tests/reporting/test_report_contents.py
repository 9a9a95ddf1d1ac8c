from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from report_runs import SETTINGS, additions, group, iterations, write_run

from rlhf_ray.reporting.report.run import read_run
from rlhf_ray.reporting.report.writing import MAX_TOKENS, report_contents


def contents_of(*paths: Path, tables: int = 6) -> dict[str, Any]:
    contents = report_contents([read_run(path) for path in paths], tables=tables)
    return dict(json.loads(json.dumps(contents, allow_nan=False)))


def test_one_run(tmp_path: Path) -> None:
    contents = contents_of(write_run(tmp_path / "first"))
    (run,) = contents["runs"]
    assert (run["name"], run["algorithm"], run["notes"]) == ("first", "PPO", [])
    assert run["results"] == {
        "iterations": 5,
        "planned": 5,
        "seconds": 7.5,
        "reward": {"first": 0.1, "last": 0.5, "best": 0.5, "bestAt": 5},
        "evaluation": [{"name": "quickstart", "first": 0.125, "last": 0.625, "best": 0.625, "bestAt": 5}],
    }
    assert run["x"] == {
        "iteration": [1, 2, 3, 4, 5],
        "samples": [256, 512, 768, 1024, 1280],
        "seconds": [1.5, 3.0, 4.5, 6.0, 7.5],
    }
    assert run["values"]["evaluation/quickstart/reward_mean"] == [0.125, None, None, None, 0.625]
    assert ["training.lr", "0.0002"] in run["settings"]
    assert [table["step"] for table in run["tables"]] == [5]
    assert contents["differences"] == []
    titles = {chart["title"] for chart in contents["charts"]}
    wanted = {"Reward", "KL of the update", "Completion length", "Entropy", "Staleness", "Time of an iteration"}
    assert wanted <= titles
    assert "Value loss" in contents["missing"]


def test_a_run_that_was_measured_before_it_began_has_all_axes(tmp_path: Path) -> None:
    at_start = {"training_iteration": 0, "timestamp": 17, "evaluation": {"quickstart": {"reward_mean": 0.05}}}
    (run,) = contents_of(write_run(tmp_path / "run", results=[at_start, *iterations(2)]))["runs"]
    assert run["x"] == {"iteration": [0, 1, 2], "samples": [0, 256, 512], "seconds": [0.0, 1.5, 3.0]}
    assert run["values"]["evaluation/quickstart/reward_mean"] == [0.05, 0.125, 0.25]
    assert run["values"]["timers/rollout_s"] == [None, 0.5, 0.5]
    assert run["results"]["evaluation"][0]["first"] == 0.05


def test_a_run_that_is_still_going_has_fewer_iterations_than_planned(tmp_path: Path) -> None:
    results = contents_of(write_run(tmp_path / "run", results=iterations(3)))["runs"][0]["results"]
    assert (results["iterations"], results["planned"]) == (3, 5)


def test_a_run_before_its_first_iteration(tmp_path: Path) -> None:
    contents = contents_of(write_run(tmp_path / "run", results=[], tables={}))
    (run,) = contents["runs"]
    assert run["results"]["iterations"] == 0
    assert run["results"]["reward"] == {"first": None, "last": None, "best": None, "bestAt": None}
    assert run["results"]["evaluation"] == []
    assert (run["tables"], contents["charts"]) == ([], [])
    # Everything is missing, so nothing in particular is.
    assert contents["missing"] == []
    assert run["notes"] == [
        "The run has not finished an iteration.",
        "There are no completions (reporting.completions_interval).",
    ]


def test_the_best_is_the_first_of_equals(tmp_path: Path) -> None:
    results = iterations(4)
    for result, reward in zip(results, (0.2, 0.9, 0.9, 0.5), strict=True):
        result["rollouts"]["reward_mean"] = reward
    reward = contents_of(write_run(tmp_path / "run", results=results))["runs"][0]["results"]["reward"]
    assert reward == {"first": 0.2, "last": 0.5, "best": 0.9, "bestAt": 2}


def test_runs_side_by_side(tmp_path: Path) -> None:
    other = SETTINGS | {"debugging": {"seed": 1}}
    contents = contents_of(write_run(tmp_path / "a"), write_run(tmp_path / "b", settings=other, results=iterations(9)))
    assert [run["name"] for run in contents["runs"]] == ["a", "b"]
    assert [len(run["x"]["iteration"]) for run in contents["runs"]] == [5, 9]
    assert contents["differences"] == [["debugging.seed", ["0", "1"]]]


def test_names_take_what_tells_them_apart(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / folder / "run") for folder in ("x/1", "y/1", "y/2")]
    assert [run["name"] for run in contents_of(*paths)["runs"]] == ["x/1/run", "y/1/run", "y/2/run"]
    assert [run["name"] for run in contents_of(*paths[1:])["runs"]] == ["1/run", "2/run"]


def test_a_resumed_run_is_one_course(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", results=[*iterations(4), *iterations(5)[2:]])
    (run,) = contents_of(path)["runs"]
    assert run["x"]["iteration"] == [1, 2, 3, 4, 5]
    assert run["results"]["iterations"] == 5


def test_without_completions(tmp_path: Path) -> None:
    (run,) = contents_of(write_run(tmp_path / "run"), tables=0)["runs"]
    assert run["tables"] == []
    assert run["notes"] == []


def test_a_run_without_evaluation_or_tables_says_how_to_have_them(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", results=iterations(5)[1:4])
    shutil.rmtree(path / "completions")
    (run,) = contents_of(path)["runs"]
    assert run["notes"] == [
        "There are no completions (reporting.completions_interval).",
        "There was no evaluation (evaluation.interval).",
    ]


def test_a_thinned_run_says_what_a_point_is(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", results=iterations(1001))
    assert contents_of(path)["runs"][0]["notes"] == ["A point of a curve stands for 2 iterations."]


def test_all_tables_of_all_runs_share_the_tokens_of_the_page(tmp_path: Path) -> None:
    long = [group(number, "p", ["x" * 1999] * 8, [0.0] * 8) for number in range(8)]
    paths = [write_run(tmp_path / name, tables={1: long, 2: additions(), 3: long}) for name in ("a", "b")]
    runs = contents_of(*paths, tables=3)["runs"]
    tokens = sum(row["tokens"] for run in runs for table in run["tables"] for row in table["rows"])
    assert 0.6 * MAX_TOKENS < tokens <= MAX_TOKENS
