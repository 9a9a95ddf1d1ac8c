from __future__ import annotations

import time

import pytest

from rlhf_ray.span_log import SpanLog
from rlhf_ray.types import TraceSpan


def test_spans_are_given_once_in_the_order_they_ended() -> None:
    log = SpanLog()
    log.add(TraceSpan(lane="a", name="first", start=0.0, end=1.0))
    with log.during("b", "second"):
        time.sleep(0.01)

    first, second = log.take()
    assert (first.name, second.lane, second.name) == ("first", "b", "second")
    assert second.end - second.start >= 0.01
    assert log.take() == []


def test_what_fails_took_time_too() -> None:
    log = SpanLog()
    with pytest.raises(ValueError, match="no"), log.during("a", "work"):
        raise ValueError("no")
    assert [span.name for span in log.take()] == ["work"]


def test_where_nobody_takes_them_the_oldest_go() -> None:
    log = SpanLog(most=2)
    for number in range(5):
        log.add(TraceSpan(lane="a", name=str(number), start=0.0, end=1.0))
    assert [span.name for span in log.take()] == ["3", "4"]
