from __future__ import annotations

from typing import Any

import pytest

from rlhf_ray.reporting.report.charts import MAX_POINTS, read_curves

REWARD, LONGEST = "rollouts/reward_mean", "rollouts/completion_tokens_max"


def rows_of(values: list[float | None], key: str = REWARD, **more: list[Any]) -> list[dict[str, Any]]:
    rows = [{"training_iteration": number, key: value} for number, value in enumerate(values, start=1)]
    for name, column in more.items():
        for row, value in zip(rows, column, strict=True):
            row[name] = value
    return rows


def test_a_short_run_keeps_every_point() -> None:
    curves = read_curves(rows_of([0.5, None, 0.25]))
    assert curves.iteration == [1, 2, 3]
    assert curves.values == {REWARD: [0.5, None, 0.25]}
    assert curves.rows_per_point == 1


def test_a_long_run_becomes_means_at_the_last_of_their_iterations() -> None:
    curves = read_curves(rows_of([float(number) for number in range(2 * MAX_POINTS + 1)]))
    assert curves.rows_per_point == 3
    assert len(curves.iteration) == 667
    assert curves.iteration[:2] == [3, 6]
    assert curves.iteration[-1] == 2 * MAX_POINTS + 1
    assert curves.values[REWARD][:2] == [1.0, 4.0]
    # The last point stands for what is left.
    assert curves.values[REWARD][-1] == pytest.approx((1998 + 1999 + 2000) / 3, rel=1e-5)


@pytest.mark.parametrize(("count", "points"), [(MAX_POINTS, MAX_POINTS), (MAX_POINTS + 1, 501), (1, 1), (0, 0)])
def test_there_are_never_more_points_than_fit(count: int, points: int) -> None:
    curves = read_curves(rows_of([1.0] * count))
    assert len(curves.iteration) == points
    assert all(len(values) == points for values in curves.values.values())


def test_a_maximum_stays_one() -> None:
    values = [0.0] * (2 * MAX_POINTS)
    values[101] = 9.0
    assert read_curves(rows_of(values, LONGEST)).values[LONGEST][50] == 9.0


def test_a_point_of_no_numbers_is_a_hole_and_a_metric_of_none_is_left_out() -> None:
    values: list[float | None] = [1.0] * (2 * MAX_POINTS)
    values[10], values[11], values[12] = None, None, None
    rows = rows_of(values)
    for row in rows:
        row["learner/value_loss"] = None
    curves = read_curves(rows)
    assert curves.values[REWARD][5] is None
    assert curves.values[REWARD][6] == 1.0
    assert list(curves.values) == [REWARD]


def test_what_no_chart_shows_is_left_out() -> None:
    assert read_curves([{"training_iteration": 1, "pid": 17, "note": "x", REWARD: "high"}]).values == {}


def test_axes_of_completions_and_of_wall_time() -> None:
    rows = rows_of([1, 2, 3], **{"time_total_s": [1.5, 3.0, 4.75], "rollouts/num_completions": [256, 256, 128]})
    curves = read_curves(rows)
    assert curves.samples == [256, 512, 640]
    assert curves.seconds == [1.5, 3.0, 4.75]


@pytest.mark.parametrize(
    ("seconds", "completions"),
    [([1.5, None, 4.0], [256, None, 256]), ([1.5, 3.0, 0.5], [256, 0, 256]), ([1.5, 1.5, 3.0], [256, True, 0])],
)
def test_an_axis_with_holes_or_that_goes_back_is_none(seconds: list[Any], completions: list[Any]) -> None:
    rows = rows_of([1, 2, 3], **{"time_total_s": seconds, "rollouts/num_completions": completions})
    curves = read_curves(rows)
    assert (curves.samples, curves.seconds) == (None, None)
    assert curves.iteration == [1, 2, 3]


def test_what_is_measured_before_the_first_iteration_lies_at_the_beginning_of_every_axis() -> None:
    rows = rows_of([1, 2], **{"time_total_s": [1.5, 3.0], "rollouts/num_completions": [256, 128]})
    held_out = "evaluation/quickstart/reward_mean"
    curves = read_curves([{"training_iteration": 0, held_out: 0.25}, *rows])
    assert (curves.iteration, curves.samples, curves.seconds) == ([0, 1, 2], [0, 256, 384], [0.0, 1.5, 3.0])
    assert curves.values == {held_out: [0.25, None, None], REWARD: [None, 1.0, 2.0]}


def test_numbers_have_the_digits_that_a_chart_can_show() -> None:
    assert read_curves(rows_of([1 / 3, 123456789.0])).values[REWARD] == [0.333333, 123457000.0]
