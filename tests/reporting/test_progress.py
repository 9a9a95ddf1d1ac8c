from __future__ import annotations

from typing import Any

import pytest

from rlhf_ray.reporting.metrics import flatten
from rlhf_ray.reporting.progress import Progress


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_before_the_first_result_there_are_no_numbers() -> None:
    progress = Progress(name="run", iterations=5)
    assert progress.iteration == 0
    assert progress.remaining_s is None
    assert progress.number("rollouts/reward_mean") is None


def test_time_runs_from_the_start_and_from_each_phase() -> None:
    clock = Clock()
    progress = Progress(name="run", iterations=5, clock=clock)
    clock.now += 10
    progress.enter("starting 2 replicas")
    clock.now += 3
    assert (progress.elapsed_s, progress.phase_s) == (13, 3)
    progress.record(flatten({"training_iteration": 1}))
    assert (progress.phase, progress.phase_s) == ("training", 0)


def test_the_time_left_follows_the_last_ten_iterations() -> None:
    progress = Progress(name="run", iterations=30)
    for iteration in range(1, 21):
        # The first ten are slow and must not count.
        progress.record(
            flatten({"training_iteration": iteration, "timers": {"iteration_s": 60.0 if iteration <= 10 else 2.0}})
        )
    assert progress.remaining_s == pytest.approx(20.0)
    progress.record(flatten({"training_iteration": 31, "timers": {"iteration_s": 2.0}}))
    assert progress.remaining_s == 0


def test_curves_grow_with_the_results(result: dict[str, Any]) -> None:
    progress = Progress(name="run", iterations=5)
    progress.record(flatten(result))
    progress.record(flatten({"training_iteration": 4, "rollouts": {"reward_mean": 0.6}}))
    assert progress.rewards == [0.5, 0.6]
    assert progress.evaluations == {"openai/gsm8k": [0.75]}
    assert progress.iteration == 4


def test_total_sums_by_prefix() -> None:
    progress = Progress(name="run", iterations=5)
    progress.record(flatten({"rewards": {"failures": {"timeout": 2, "raised": 1}, "gsm8k": {"mean": 5.0}}}))
    assert progress.total("rewards/failures/") == 3
