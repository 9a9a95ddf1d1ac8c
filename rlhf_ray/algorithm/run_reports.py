"""What a run tells its reporters: phases, results, completions and the timeline, each when it is due."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from rlhf_ray.config.settings import Settings
from rlhf_ray.reporting.reporter_set import ReporterSet
from rlhf_ray.reporting.run_directory import RunDirectory
from rlhf_ray.span_log import SpanLog
from rlhf_ray.types import Float32Array, ScoredGroup, TraceSpan

__all__ = ["RunReports", "is_due"]


class RunReports:
    """The reporters of a run, and the spans of the Algorithm's own phases.

    Args:
        settings: The run's settings.
    """

    def __init__(self, settings: Settings) -> None:
        self._intervals = settings.reporting
        self._reporters = ReporterSet.from_settings(settings)
        self._spans = SpanLog()

    def start(self, settings: Settings, directory: RunDirectory) -> None:
        """Start all reporters.

        Raises:
            ConfigError: A reporter's setting cannot work here.
        """
        self._reporters.start(settings, directory)

    def restart(self, settings: Settings, directory: RunDirectory) -> None:
        """Start new reporters: the files of those before have changed."""
        self._reporters = ReporterSet.from_settings(settings)
        self.start(settings, directory)

    def stop(self) -> None:
        """Stop all reporters; may be called again."""
        self._reporters.stop()

    def say(self, text: str) -> None:
        """Tell what the run is busy with."""
        self._reporters.phase(text)

    def report(self, result: Mapping[str, Any]) -> None:
        """Hand over a result."""
        self._reporters.report(result)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Keep what happens within as a span of the timeline."""
        return self._spans.during("algorithm", name)

    def add_spans(self, spans: Iterable[TraceSpan]) -> None:
        """Keep spans of others for the timeline."""
        self._spans.add(*spans)

    def completions_are_due(self, number: int) -> bool:
        """Whether the completions of an iteration are reported."""
        return is_due(self._intervals.completions_interval, number)

    def completions(
        self, number: int, groups: tuple[ScoredGroup, ...], advantages: tuple[Float32Array, ...] | None
    ) -> None:
        """Report the completions of an iteration, where they are due."""
        if self.completions_are_due(number):
            self._reporters.report_completions(number, groups, advantages)

    def timeline(self, number: int, *sources: Callable[[], Iterable[TraceSpan]]) -> None:
        """Report the spans of an iteration, where they are due.

        Args:
            number: The iteration.
            sources: Give the spans of other processes.
        """
        if self._intervals.timeline_interval > 0:
            # In every iteration, or one that is written would have those of several.
            spans = [*self._spans.take(), *(span for take in sources for span in take())]
            if is_due(self._intervals.timeline_interval, number):
                self._reporters.report_spans(number, spans)


def is_due(interval: int, number: int) -> bool:
    """Whether something that happens every so many iterations, 0 for never, happens in this one."""
    return interval > 0 and number % interval == 0
