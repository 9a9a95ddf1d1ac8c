from __future__ import annotations

from typing import Any

import pytest

from rlhf_ray.algorithm.run_checkpoints import RunCheckpoints


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What this process has counted."""
    counted = {"retries": 2, "restarts": 0}
    monkeypatch.setattr(RunCheckpoints, "_counted_here", lambda self: counted)
    return counted


@pytest.fixture
def checkpoints() -> RunCheckpoints:
    nothing: Any = None
    parts: Any = type("Parts", (), {"learners": None})
    return RunCheckpoints(nothing, nothing, parts)


def test_a_resumed_run_continues_counting(here: dict[str, int], checkpoints: RunCheckpoints) -> None:
    assert checkpoints.counts() == {"retries": 2, "restarts": 0}

    here["retries"] = 3
    # An older checkpoint may lack a name; what is not counted any more is left out.
    checkpoints.count_from({"retries": 10, "gone": 5})
    assert checkpoints.counts() == {"retries": 10, "restarts": 0}

    here |= {"retries": 4, "restarts": 1}
    assert checkpoints.counts() == {"retries": 11, "restarts": 1}


def test_another_run_in_the_same_process_begins_at_zero(here: dict[str, int], checkpoints: RunCheckpoints) -> None:
    checkpoints.count_from({})
    assert checkpoints.counts() == {"retries": 0, "restarts": 0}
