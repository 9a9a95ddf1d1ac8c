from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from rich.console import Console

from rlhf_ray.config.settings import Settings
from rlhf_ray.reporting import RunDirectory
from rlhf_ray.reporting.completions import CompletionsReporter
from rlhf_ray.reporting.summary import RunSummary, show_evaluation, show_quickstart, show_samples, show_summary
from rlhf_ray.types import ScoredGroup


def printed(show: Callable[[Console], None]) -> str:
    file = io.StringIO()
    show(Console(file=file, width=80))
    return file.getvalue()


def test_the_summary_says_what_the_run_came_to(run_dir: RunDirectory, result: dict[str, Any]) -> None:
    run = RunSummary(run_dir=run_dir, elapsed_s=247)
    run.record({"rollouts": {"reward_mean": 0.25}})
    run.record(result)
    text = printed(lambda console: show_summary(console, run))
    pairs = dict(line.split("  ", 1) for line in text.splitlines())
    values = {name.strip(): value.strip() for name, value in pairs.items()}
    assert values == {
        "iterations": "2",
        "time": "4:07",
        "reward": "0.250 -> 0.500",
        "evaluation/openai/gsm8k/reward_mean": "0.750",
        "run directory": str(run_dir.path),
        "trained model": str(run_dir.path / "model"),
    }


def test_a_long_path_is_not_broken(run_dir: RunDirectory) -> None:
    far = RunDirectory(run_dir.path / ("deep" * 30))
    assert str(far.path) in printed(lambda console: show_summary(console, RunSummary(run_dir=far)))


def test_an_evaluation_is_listed_by_key() -> None:
    text = printed(lambda console: show_evaluation(console, {"gsm8k": {"reward_mean": 0.5, "note": "x"}}))
    assert text.split() == ["gsm8k/reward_mean", "0.500"]


def test_samples_are_one_per_prompt_from_the_newest_table(run_dir: RunDirectory, groups: list[ScoredGroup]) -> None:
    reporter = CompletionsReporter(Settings(), run_dir)
    reporter.report_completions(1, groups[1:])
    reporter.report_completions(2, groups)
    text = printed(lambda console: show_samples(console, run_dir))
    assert "iteration 2" in text
    lines = [line.split() for line in text.splitlines() if "1+1=" in line or "Hallo" in line]
    assert lines[0] == ["1+1=", "2", "right"]
    assert len(lines) == 2


def test_control_characters_of_a_completion_do_not_reach_the_terminal(run_dir: RunDirectory) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    run_dir.completions.mkdir()
    row = {"step": 1, "group_id": 0, "prompt": "a", "completion": "x\x1b[2J\ny", "reward": 0.0}
    pq.write_table(pa.Table.from_pylist([row]), run_dir.completions / "step_000001.parquet")
    text = printed(lambda console: show_samples(console, run_dir))
    assert "\x1b" not in text
    assert "x?[2J?y" in text
    assert "wrong" in text


def test_without_tables_there_are_no_samples(run_dir: RunDirectory) -> None:
    assert printed(lambda console: show_samples(console, run_dir)) == ""


def test_the_quickstart_shows_the_climb_and_what_to_do_next(run_dir: RunDirectory) -> None:
    run = RunSummary(run_dir=run_dir, iterations=40, elapsed_s=95)
    before, after = {"quickstart": {"reward_mean": 0.412}}, {"quickstart": {"reward_mean": 0.93}}
    text = printed(lambda console: show_quickstart(console, before, after, run))
    assert "before training (greedy): 41.2%" in text
    assert "after training (greedy): 93.0%" in text
    assert "40 iterations in 1:35" in text
    assert f"tensorboard --logdir {run_dir.tensorboard}" in text
    assert str(run_dir.model) in text
