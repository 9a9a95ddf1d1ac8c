"""Who did what when in an iteration, as a trace for Perfetto (ui.perfetto.dev) or chrome://tracing."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from rlhf_ray.config.settings import Settings
from rlhf_ray.reporting.reporter import Reporter
from rlhf_ray.reporting.run_directory import RunDirectory, write_whole
from rlhf_ray.types import TraceSpan

__all__ = ["TimelineReporter", "trace_events"]


class TimelineReporter(Reporter):
    """Writes ``timeline/step_000001.json`` every ``reporting.timeline_interval`` iterations."""

    def __init__(self, settings: Settings, run_dir: RunDirectory) -> None:
        self._folder = run_dir.timeline
        self._folder.mkdir(exist_ok=True)

    def report_spans(self, step: int, spans: Sequence[TraceSpan]) -> None:
        """Write the iteration's trace."""
        write_whole(self._folder / f"step_{step:06d}.json", json.dumps({"traceEvents": trace_events(spans)}))


def trace_events(spans: Sequence[TraceSpan]) -> list[dict[str, Any]]:
    """Spans as complete events of the Trace Event Format, times in microseconds since the first one.

    A lane is a process; worker 2 comes before worker 10. Spans that overlap without one being within the other are in
    different rows.
    """
    if not spans:
        return []
    origin = min(span.start for span in spans)
    lanes: defaultdict[str, list[TraceSpan]] = defaultdict(list)
    for span in spans:
        lanes[span.lane].append(span)
    events: list[dict[str, Any]] = []
    for process, lane in enumerate(sorted(lanes, key=_by_number), start=1):
        events.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": lane}})
        for row, span in _in_rows(lanes[lane]):
            start, length = 1e6 * (span.start - origin), 1e6 * (span.end - span.start)
            events.append({"ph": "X", "name": span.name, "pid": process, "tid": row, "ts": start, "dur": length})
    return events


def _by_number(lane: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", lane)]


def _in_rows(spans: Iterable[TraceSpan]) -> Iterable[tuple[int, TraceSpan]]:
    """Put each span into the first row where it overlaps none, or lies within the last one."""
    rows: list[list[TraceSpan]] = []
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        for number, open_spans in enumerate(rows):
            while open_spans and open_spans[-1].end <= span.start:
                open_spans.pop()
            if not open_spans or span.end <= open_spans[-1].end:
                open_spans.append(span)
                yield number, span
                break
        else:
            rows.append([span])
            yield len(rows) - 1, span
