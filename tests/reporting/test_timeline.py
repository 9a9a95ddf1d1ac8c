from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.settings import Settings
from rlhf_ray.reporting.run_directory import RunDirectory
from rlhf_ray.reporting.timeline import TimelineReporter, trace_events
from rlhf_ray.types import TraceSpan


def span(lane: str, name: str, start: float, end: float) -> TraceSpan:
    return TraceSpan(lane=lane, name=name, start=100.0 + start, end=100.0 + end)


def rows(*spans: TraceSpan) -> dict[str, int]:
    return {event["name"]: event["tid"] for event in trace_events(spans) if event["ph"] == "X"}


def test_times_are_microseconds_since_the_first_span() -> None:
    events = trace_events([span("b", "late", 1.5, 2.0), span("a", "early", 0.0, 0.25)])

    timed = {event["name"]: (event["ts"], event["dur"]) for event in events if event["ph"] == "X"}
    assert timed == {"early": (0.0, pytest.approx(250_000)), "late": (pytest.approx(1.5e6), pytest.approx(5e5))}


def test_every_lane_is_a_process_with_its_name() -> None:
    events = trace_events([span("learner 0", "update", 0, 1), span("replica x", "group 1", 0, 1)])

    names = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert sorted(names.values()) == ["learner 0", "replica x"]
    assert {names[event["pid"]]: event["name"] for event in events if event["ph"] == "X"} == {
        "learner 0": "update",
        "replica x": "group 1",
    }


def test_lanes_are_in_the_order_of_their_numbers() -> None:
    lanes = ["replica x", "environment worker 10", "reward worker 0", "environment worker 2", "learner 0"]
    events = trace_events([span(lane, "step", 0, 1) for lane in lanes])

    assert [event["args"]["name"] for event in events if event["ph"] == "M"] == [
        "environment worker 2",
        "environment worker 10",
        "learner 0",
        "replica x",
        "reward worker 0",
    ]


def test_what_lies_within_another_shares_its_row() -> None:
    assert rows(span("l", "update", 0, 3), span("l", "first half", 0, 1), span("l", "second half", 1, 3)) == {
        "update": 0,
        "first half": 0,
        "second half": 0,
    }


def test_what_overlaps_lies_in_rows_below_each_other() -> None:
    found = rows(span("r", "a", 0, 2), span("r", "b", 1, 3), span("r", "c", 2, 4), span("r", "d", 2.5, 3.5))

    assert found == {"a": 0, "b": 1, "c": 0, "d": 0}
    assert rows(span("r", "a", 0, 2), span("q", "b", 1, 3)) == {"a": 0, "b": 0}


def test_no_spans_are_an_empty_trace() -> None:
    assert trace_events([]) == []


def test_the_file_is_a_trace(tmp_path: Path) -> None:
    reporter = TimelineReporter(Settings(), RunDirectory(tmp_path))
    reporter.report_spans(7, [span("learner 0", "update", 0, 1)])

    trace: dict[str, Any] = json.loads((tmp_path / "timeline" / "step_000007.json").read_text())
    assert [event["ph"] for event in trace["traceEvents"]] == ["M", "X"]
    assert [path.name for path in (tmp_path / "timeline").iterdir()] == ["step_000007.json"]
