from __future__ import annotations

from rlhf_ray.algorithm.run_checkpoints import RunCounts


def test_a_resumed_run_continues_counting() -> None:
    here = {"retries": 2, "restarts": 0}
    counts = RunCounts(lambda: here)
    assert counts.totals() == {"retries": 2, "restarts": 0}

    here["retries"] = 3
    # An older checkpoint may lack a name; what is not counted any more is left out.
    counts.continue_from({"retries": 10, "gone": 5})
    assert counts.totals() == {"retries": 10, "restarts": 0}

    here |= {"retries": 4, "restarts": 1}
    assert counts.totals() == {"retries": 11, "restarts": 1}


def test_another_run_in_the_same_process_begins_at_zero() -> None:
    here = {"retries": 2}
    counts = RunCounts(lambda: here)
    counts.continue_from({})
    assert counts.totals() == {"retries": 0}
