"""After each iteration: every reporter of a run, none of which can end the training."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from rlhf_ray.config.settings import Settings
from rlhf_ray.errors import ConfigError
from rlhf_ray.reporting.reporter import Reporter
from rlhf_ray.reporting.run_directory import RunDirectory
from rlhf_ray.stopping import stop_all
from rlhf_ray.types import Float32Array, ScoredGroup, TraceSpan
from rlhf_ray.untrusted_text import shortened

__all__ = ["ReporterSet"]

_logger = logging.getLogger(__name__)


class ReporterSet(Reporter):
    """Calls each reporter; tolerates and counts what they raise.

    A full disk or a lost connection must not cost a training run, so an exception of a reporter is logged (the first
    one of each reporter at WARNING with its traceback, later ones at DEBUG) and counted. Two things are not
    tolerated: a ``ConfigError`` at the start, which nobody should learn of after the run, and an interrupt.
    """

    def __init__(self, reporters: Sequence[Reporter]) -> None:
        self._reporters = list(reporters)
        self._failed: set[int] = set()
        self._failures = 0

    @classmethod
    def from_settings(cls, settings: Settings) -> ReporterSet:
        """Choose the reporters that ``settings.reporting`` asks for."""
        from rlhf_ray.reporting.completions import CompletionsReporter
        from rlhf_ray.reporting.console import ConsoleReporter
        from rlhf_ray.reporting.jsonl import JsonlReporter
        from rlhf_ray.reporting.mlflow import MlflowReporter
        from rlhf_ray.reporting.tensorboard import TensorBoardReporter
        from rlhf_ray.reporting.timeline import TimelineReporter
        from rlhf_ray.reporting.wandb import WandbReporter

        reporting = settings.reporting
        reporters: list[Reporter] = [JsonlReporter()]
        if reporting.completions_interval:
            reporters.append(CompletionsReporter())
        if reporting.timeline_interval:
            reporters.append(TimelineReporter())
        if reporting.tensorboard:
            reporters.append(TensorBoardReporter())
        if reporting.wandb_project is not None:
            reporters.append(WandbReporter())
        if reporting.mlflow_experiment is not None:
            reporters.append(MlflowReporter())
        if reporting.progress != "off":
            reporters.append(ConsoleReporter())
        return cls(reporters)

    @property
    def failures(self) -> int:
        """Calls that raised so far (``reporting/failures``)."""
        return self._failures

    def start(self, settings: Settings, run_dir: RunDirectory) -> None:
        """Start every reporter; one that fails is left out of the run.

        Raises:
            ConfigError: A reporter's setting cannot work here; those already started are stopped.
        """
        started = []
        for reporter in self._reporters:
            try:
                if self._tolerate(reporter, "start", settings, run_dir):
                    started.append(reporter)
            except ConfigError:
                self._reporters = started
                self.stop()
                raise
        self._reporters = started

    def phase(self, text: str) -> None:
        """Tell every reporter what the run is busy with."""
        self._each("phase", text)

    def report(self, result: Mapping[str, Any]) -> None:
        """Hand the result to every reporter, with the failures before it as ``reporting/failures``."""
        self._each("report", {**result, "reporting": {"failures": self._failures}})

    def report_completions(
        self, step: int, groups: Sequence[ScoredGroup], advantages: Sequence[Float32Array] | None = None
    ) -> None:
        """Hand the iteration's groups to every reporter."""
        self._each("report_completions", step, groups, advantages)

    def report_spans(self, step: int, spans: Sequence[TraceSpan]) -> None:
        """Hand the iteration's spans to every reporter."""
        self._each("report_spans", step, spans)

    def stop(self) -> None:
        """Stop every reporter; a second call does nothing."""
        reporters, self._reporters = self._reporters, []
        # An interrupt is not tolerated, and yet ends no other reporter.
        stop_all(*((type(each).__name__, partial(self._tolerate, each, "stop")) for each in reporters))

    def _each(self, method: str, *arguments: object) -> None:
        for reporter in self._reporters:
            self._tolerate(reporter, method, *arguments)

    def _tolerate(self, reporter: Reporter, method: str, *arguments: object) -> bool:
        try:
            getattr(reporter, method)(*arguments)
        except Exception as error:
            if method == "start" and isinstance(error, ConfigError):
                raise
            self._failures += 1
            level = logging.DEBUG if id(reporter) in self._failed else logging.WARNING
            self._failed.add(id(reporter))
            # Not exc_info: the error of a reporter may quote the completions that it was given.
            frames = "".join(traceback.format_tb(error.__traceback__))
            failed = f"{type(reporter).__name__}.{method}() failed; the run goes on"
            _logger.log(
                level,
                "%s\nTraceback (most recent call last):\n%s%s: %s",
                failed,
                frames,
                type(error).__name__,
                shortened(error),
            )
            return False
        return True
