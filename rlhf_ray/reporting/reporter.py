"""What a place that shows or stores results overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlhf_ray.reporting.metrics import Scalar
from rlhf_ray.types import ScoredGroup, TokenEstimates, TraceSpan

__all__ = ["Reporter"]


class Reporter:
    """Receives what a run produces; does nothing with it until a subclass overrides a method.

    A reporter is made as ``Kind(settings, run_dir)`` when the run starts: ``__init__`` opens what it needs, and raises
    ``ConfigError`` for a setting that cannot work here. All calls come from the driver; ``stop`` is the last one.
    """

    def phase(self, text: str) -> None:
        """Receive what the run is busy with, in a few words, until the next phase or result."""

    def report(self, row: Mapping[str, Scalar]) -> None:
        """Receive the result of an iteration: the keys of ``METRICS``, joined by ``/``, and their values."""

    def report_completions(
        self, step: int, groups: Sequence[ScoredGroup], estimates: Sequence[TokenEstimates] | None = None
    ) -> None:
        """Receive the groups that iteration ``step`` trained on, in iterations whose completions are reported.

        Args:
            step: Number of the iteration, from 1.
            groups: In the order of the batch.
            estimates: Of each sequence, in the order of the groups and of their trajectories' sequences; ``None`` where
                learners were not asked for them.
        """

    def report_spans(self, step: int, spans: Sequence[TraceSpan]) -> None:
        """Receive what replicas, reward actors, learners and the Algorithm did in iteration ``step``."""

    def stop(self) -> None:
        """Write what is held back and close."""
