"""What a part of a run did and when, for the timeline, until the Algorithm takes it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from rlhf_ray.types import TraceSpan

__all__ = ["SpanLog"]


class SpanLog:
    """Spans in the order they ended; any thread may use it.

    Args:
        most: How many are kept at most; the oldest are dropped first.
    """

    def __init__(self, most: int = 10_000) -> None:
        self._spans: deque[TraceSpan] = deque(maxlen=most)

    def add(self, *spans: TraceSpan) -> None:
        """Keep spans."""
        self._spans.extend(spans)

    @contextmanager
    def during(self, lane: str, name: str) -> Iterator[None]:
        """Keep what happens within as one span, however it ends."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(TraceSpan.ending_now(lane, name, time.perf_counter() - started))

    def take(self) -> list[TraceSpan]:
        """Give what was kept since the last call."""
        taken = []
        while self._spans:
            taken.append(self._spans.popleft())
        return taken
