from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from rlhf_ray.config.settings import ReportingSettings, Settings
from rlhf_ray.errors import ConfigError
from rlhf_ray.reporting import Reporter, ReporterSet, RunDirectory, flatten
from rlhf_ray.types import ScoredGroup, TokenEstimates


class Recorder(Reporter):
    """Writes down what it is called with; raises in the methods named in ``failing``."""

    def __init__(self, *failing: str, error: BaseException | None = None) -> None:
        self.failing = failing
        self.error = error or OSError("disk full")
        self.calls: list[str] = []
        self.results: list[Mapping[str, Any]] = []

    def __call__(self, settings: Settings, run_dir: RunDirectory) -> Reporter:
        self._called("start")
        return self

    def phase(self, text: str) -> None:
        self._called("phase")

    def report(self, row: Mapping[str, Any]) -> None:
        self.results.append(row)
        self._called("report")

    def report_completions(
        self, step: int, groups: Sequence[ScoredGroup], estimates: Sequence[TokenEstimates] | None = None
    ) -> None:
        self._called("report_completions")

    def stop(self) -> None:
        self._called("stop")

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name in self.failing:
            raise self.error


def run_through(reporters: ReporterSet, run_dir: RunDirectory, result: Mapping[str, Any], reports: int = 1) -> None:
    reporters.start(Settings(), run_dir)
    reporters.phase("sampling")
    for _ in range(reports):
        reporters.report(result)
    reporters.report_completions(1, [])
    reporters.stop()


def test_every_reporter_hears_everything(run_dir: RunDirectory, result: dict[str, Any]) -> None:
    recorders = [Recorder(), Recorder()]
    run_through(ReporterSet(recorders), run_dir, result)
    for recorder in recorders:
        assert recorder.calls == ["start", "phase", "report", "report_completions", "stop"]
        assert recorder.results == [{**flatten(result), "reporting/failures": 0}]


def test_the_log_names_the_place_and_cuts_what_the_error_quotes(
    run_dir: RunDirectory, result: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    broken = Recorder("report_completions", error=ValueError("cannot write " + "hostile\x1b " * 10_000))
    with caplog.at_level(logging.WARNING, logger="rlhf_ray.reporting"):
        run_through(ReporterSet([broken]), run_dir, result)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "Recorder.report_completions() failed; training continues" in message
    assert f'File "{__file__}"' in message
    assert "ValueError: cannot write hostile" in message
    assert len(message) < 2000
    assert "\x1b" not in message
    assert caplog.records[0].exc_info is None


def test_a_failing_reporter_stops_neither_the_run_nor_the_others(
    run_dir: RunDirectory, result: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    broken, whole = Recorder("report", "stop"), Recorder()
    reporters = ReporterSet([broken, whole])
    with caplog.at_level(logging.DEBUG, logger="rlhf_ray.reporting"):
        run_through(reporters, run_dir, result, reports=3)
    assert reporters.failures == 4
    assert broken.calls.count("report") == 3  # a full disk may be emptied
    assert [row["reporting/failures"] for row in whole.results] == [0, 1, 2]
    assert whole.calls[-1] == "stop"
    # One warning with the traceback; the rest would bury the log of a long run.
    assert [record.levelname for record in caplog.records] == ["WARNING", "DEBUG", "DEBUG", "DEBUG"]
    assert "disk full" in caplog.text
    assert "Traceback" in caplog.text


def test_each_reporter_has_its_own_first_failure(
    run_dir: RunDirectory, result: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    run_through(ReporterSet([Recorder("report"), Recorder("report")]), run_dir, result, reports=2)
    assert [record.levelname for record in caplog.records if record.levelname == "WARNING"] == ["WARNING"] * 2


def test_a_reporter_that_cannot_start_is_left_out(run_dir: RunDirectory, result: dict[str, Any]) -> None:
    broken, whole = Recorder("start"), Recorder()
    reporters = ReporterSet([broken, whole])
    run_through(reporters, run_dir, result)
    assert broken.calls == ["start"]
    assert whole.results[0]["reporting/failures"] == 1


def test_a_wrong_setting_ends_the_start_and_stops_those_before(run_dir: RunDirectory) -> None:
    first, wrong = Recorder(), Recorder("start", error=ConfigError("reporting.wandb_mode", "online", "log in"))
    with pytest.raises(ConfigError):
        ReporterSet([first, wrong]).start(Settings(), run_dir)
    assert first.calls == ["start", "stop"]


def test_an_interrupt_goes_through(run_dir: RunDirectory, result: dict[str, Any]) -> None:
    reporters = ReporterSet([Recorder("report", error=KeyboardInterrupt())])
    reporters.start(Settings(), run_dir)
    with pytest.raises(KeyboardInterrupt):
        reporters.report(result)


def test_stop_twice_stops_once(run_dir: RunDirectory) -> None:
    recorder = Recorder()
    reporters = ReporterSet([recorder])
    reporters.start(Settings(), run_dir)
    reporters.stop()
    reporters.stop()
    assert recorder.calls.count("stop") == 1


@pytest.mark.parametrize(
    ("reporting", "names"),
    [
        (
            ReportingSettings(),
            ["JsonlReporter", "CompletionsReporter", "TensorBoardReporter", "ConsoleReporter"],
        ),
        (
            ReportingSettings(completions_interval=0, tensorboard=False, progress="off", wandb_project="p"),
            ["JsonlReporter", "WandbReporter"],
        ),
    ],
)
def test_the_settings_choose_the_reporters(reporting: ReportingSettings, names: list[str]) -> None:
    chosen = ReporterSet.from_settings(Settings(reporting=reporting))
    assert [kind.__name__ for kind in chosen._kinds] == names


def test_all_files_of_a_run_are_written(
    run_dir: RunDirectory, result: dict[str, Any], groups: list[ScoredGroup]
) -> None:
    reporters = ReporterSet.from_settings(Settings())
    reporters.start(Settings(), run_dir)
    reporters.report(result)
    reporters.report_completions(3, groups)
    reporters.stop()
    assert reporters.failures == 0
    written = {str(path.relative_to(run_dir.path)) for path in run_dir.path.rglob("*") if path.is_file()}
    assert {"config.yaml", "metrics.jsonl", "completions/step_000003.parquet"} <= written
    assert any(name.startswith("tensorboard/events.out.tfevents") for name in written)


def test_an_interrupt_while_one_reporter_stops_stops_the_others_too(run_dir: RunDirectory) -> None:
    interrupted, whole = Recorder("stop", error=KeyboardInterrupt()), Recorder()
    reporters = ReporterSet([interrupted, whole])
    reporters.start(Settings(), run_dir)
    with pytest.raises(KeyboardInterrupt):
        reporters.stop()
    assert whole.calls == ["start", "stop"]


def test_a_reporter_that_is_not_hashable_cannot_end_the_run(run_dir: RunDirectory) -> None:
    @dataclass
    class Unhashable(Reporter):
        settings: Settings
        run_dir: RunDirectory

        def phase(self, text: str) -> None:
            raise OSError("disk full")

    reporters = ReporterSet([Unhashable])
    reporters.start(Settings(), run_dir)
    reporters.phase("sampling")
    reporters.phase("update")
    reporters.stop()
    assert reporters.failures == 2
