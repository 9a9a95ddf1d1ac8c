"""Every reporter of a run, none of which can end the training."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from rlhf_ray.config.settings import Settings
from rlhf_ray.errors import ConfigError
from rlhf_ray.reporting.metrics import flatten
from rlhf_ray.reporting.reporter import Reporter
from rlhf_ray.reporting.run_directory import RunDirectory
from rlhf_ray.stopping import stop_all
from rlhf_ray.types import ScoredGroup, TokenEstimates, TraceSpan
from rlhf_ray.untrusted_text import shortened

__all__ = ["ReporterSet"]

_logger = logging.getLogger(__name__)


class ReporterSet:
    """Makes and calls each reporter; tolerates and counts what they raise.

    A full disk or a lost connection must not cost a training run, so an exception of a reporter is logged (the first
    one of each reporter at WARNING with its traceback, later ones at DEBUG) and counted. Two things are not
    tolerated: a ``ConfigError`` at the start, which should be known before the run, and an interrupt.

    Args:
        kinds: What makes a reporter of the settings and the run directory: its class.
    """

    def __init__(self, kinds: Sequence[Callable[[Settings, RunDirectory], Reporter]]) -> None:
        self._kinds = kinds
        self._reporters: list[Reporter] = []
        self._failed: set[int] = set()
        """By identity: a reporter of the user's own may not be hashable, as a dataclass is not."""
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
        choices: tuple[tuple[type[Reporter], bool], ...] = (
            (JsonlReporter, True),
            (CompletionsReporter, reporting.completions_interval > 0),
            (TimelineReporter, reporting.timeline_interval > 0),
            (TensorBoardReporter, reporting.tensorboard),
            (WandbReporter, reporting.wandb_project is not None),
            (MlflowReporter, reporting.mlflow_experiment is not None),
            (ConsoleReporter, reporting.progress != "off"),
        )
        return cls([kind for kind, is_chosen in choices if is_chosen])

    @property
    def failures(self) -> int:
        """Calls that raised so far (``reporting/failures``)."""
        return self._failures

    def start(self, settings: Settings, run_dir: RunDirectory) -> None:
        """Make every reporter; one that fails is left out of the run.

        Raises:
            ConfigError: A reporter's setting cannot work here; those already made are stopped.
        """
        for kind in self._kinds:
            try:
                self._reporters.append(kind(settings, run_dir))
            except ConfigError:
                self.stop()
                raise
            except Exception as error:
                self._count(f"{getattr(kind, '__name__', kind)}()", error)

    def phase(self, text: str) -> None:
        """Tell every reporter what the run is busy with."""
        self._each("phase", text)

    def report(self, result: Mapping[str, Any]) -> None:
        """Hand a result to every reporter as a flat row, with the failures before it as ``reporting/failures``."""
        self._each("report", flatten(result) | {"reporting/failures": self._failures})

    def report_completions(
        self, step: int, groups: Sequence[ScoredGroup], estimates: Sequence[TokenEstimates] | None = None
    ) -> None:
        """Hand the iteration's groups to every reporter."""
        self._each("report_completions", step, groups, estimates)

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

    def _tolerate(self, reporter: Reporter, method: str, *arguments: object) -> None:
        try:
            getattr(reporter, method)(*arguments)
        except Exception as error:
            level = logging.DEBUG if id(reporter) in self._failed else logging.WARNING
            self._failed.add(id(reporter))
            self._count(f"{type(reporter).__name__}.{method}()", error, level=level)

    def _count(self, call: str, error: Exception, *, level: int = logging.WARNING) -> None:
        self._failures += 1
        # Not exc_info: the error of a reporter may quote the completions that it was given.
        frames = "".join(traceback.format_tb(error.__traceback__))
        failed = f"{call} failed; training continues\nTraceback (most recent call last):\n{frames}"
        _logger.log(level, "%s%s: %s", failed, type(error).__name__, shortened(error))
