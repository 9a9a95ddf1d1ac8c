"""After each iteration: what a place that shows or stores results has to offer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_ray.config.settings import Settings
from rlhf_ray.reporting.run_directory import RunDirectory
from rlhf_ray.types import Float32Array, ScoredGroup, TraceSpan

__all__ = ["Reporter"]


class Reporter:
    """Receives what a run produces; does nothing with it until a subclass overrides a method.

    All calls come from the driver, in this order: ``start``, then any of ``phase``, ``report``,
    ``report_completions`` and ``report_spans``, then ``stop``.
    """

    def start(self, settings: Settings, run_dir: RunDirectory) -> None:
        """Open what is needed; raise ``ConfigError`` for a setting that cannot work here."""

    def phase(self, text: str) -> None:
        """Hear what the run is busy with, in a few words, until the next phase or result."""

    def report(self, result: Mapping[str, Any]) -> None:
        """Receive the nested result of an iteration."""

    def report_completions(
        self, step: int, groups: Sequence[ScoredGroup], advantages: Sequence[Float32Array] | None = None
    ) -> None:
        """Receive the groups that iteration ``step`` trained on.

        Args:
            step: Number of the iteration, from 1.
            groups: In the order of the batch.
            advantages: A completion each, in the order of the groups: ``[T]`` as they entered the loss, ``[0]`` where
                the completion was left out of it.
        """

    def report_spans(self, step: int, spans: Sequence[TraceSpan]) -> None:
        """Receive what replicas, reward actors, learners and the Algorithm did in iteration ``step``."""

    def stop(self) -> None:
        """Write what is held back and close."""
