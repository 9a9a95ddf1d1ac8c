from __future__ import annotations

import io
import math
from typing import Any

import pytest
from rich.console import Console

from rlhf_ray.reporting.metrics import flatten
from rlhf_ray.reporting.panel import ProgressPanel, duration, plain_line, short, sparkline
from rlhf_ray.reporting.progress import Progress


def drawn(progress: Progress, *, width: int = 80, encoding: str = "utf-8") -> list[str]:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding=encoding), width=width)
    console.print(ProgressPanel(progress))
    console.file.flush()
    return raw.getvalue().decode(encoding).splitlines()


def full_result(iteration: int) -> dict[str, Any]:
    return {
        "training_iteration": iteration,
        "rollouts": {
            "reward_mean": iteration / 30,
            "completion_tokens_mean": 1432.25,
            "completion_tokens_max": 2048,
            "truncated_fraction": 0.125,
            "tokens_per_s": 51234.5,
        },
        "learner": {
            "approx_kl": 1.23e-5,
            "clip_fraction": 0.0512,
            "entropy": 0.81,
            "grad_norm": 123.4,
            "value_loss": 0.0812,
            "explained_variance": -0.42,
            "tokens_per_s": 123456.7,
        },
        "timers": {
            "rollout_s": 1234.5,
            "advantage_s": 120.25,
            "update_s": 800.5,
            "weight_sync_s": 14.5,
            "iteration_s": 2170.0,
        },
        "evaluation": {"gsm8k": {"reward_mean": 0.5 + iteration / 100}},
        "rewards": {"failures": {"timeout": 2}},
        "fault_tolerance": {"replica_restarts": 1, "learner_restarts": 0},
    }


def after(iterations: int) -> Progress:
    progress = Progress(name="PPO-20250101-120000", iterations=40)
    for iteration in range(1, iterations + 1):
        progress.record(flatten(full_result(iteration)))
    return progress


@pytest.mark.parametrize("width", [80, 120])
def test_the_panel_keeps_to_its_width_and_cuts_nothing(width: int) -> None:
    lines = drawn(after(27), width=width)
    assert {len(line) for line in lines} == {width}
    assert not any("…" in line for line in lines)


def test_the_panel_shows_what_matters() -> None:
    text = "\n".join(drawn(after(27)))
    for shown in ("27/40", "left", "0.900", "held-out", "0.770", "1.2e-05", "5.1%", "2048", "12.5%", "51.2k", "2170"):
        assert shown in text
    assert "reward failures 2" in text
    assert "replica restarts 1" in text
    assert "learner restarts" not in text


def with_environments() -> Progress:
    progress = Progress(name="run", iterations=40)
    played = {
        "guess": {"reward_mean": 0.625, "steps_mean": 2.5, "step_s": 0.0125, "failures": {"raised": 2}},
        "[red]{shop}[/]": {"reward_mean": -1.5, "steps_mean": 4.0, "failures": {"raised": 1, "timeout": 4}},
        "broken": {"failures": {"raised": 1}},
    }
    result = full_result(1)
    result["rollouts"]["turns_mean"] = 3.25
    progress.record(flatten(result | {"environment": played}))
    return progress


def test_environments_have_rows_of_their_own() -> None:
    lines = drawn(with_environments())
    (guess,) = [line for line in lines if "guess" in line]
    (shop,) = [line for line in lines if "[red]{shop}[/]" in line]
    assert "reward 0.625  turns 2.50  seconds per step 0.0125" in guess
    assert "reward -1.50  turns 4 " in shop
    assert "seconds" not in shop
    assert not any("broken" in line for line in lines)
    assert any("reward failures 2  environment failures 8" in line for line in lines)
    assert {len(line) for line in lines} == {80}


def test_without_environments_there_are_no_turns() -> None:
    progress = Progress(name="run", iterations=40)
    progress.record(flatten({"training_iteration": 1, "rollouts": {"reward_mean": 0.5, "turns_mean": 1.0}}))
    assert "turns" not in "\n".join(drawn(progress)) + plain_line(progress)


def test_the_plain_line_has_turns_and_rewards_of_environments() -> None:
    line = plain_line(with_environments())
    assert "reward 0.0333  guess 0.625  [red]{shop}[/] -1.50  held-out 0.510" in line
    assert "length 1.4k  turns 3.25" in line.replace("length 1432", "length 1.4k")


def test_a_narrow_panel_still_has_its_frame() -> None:
    assert {len(line) for line in drawn(after(3), width=40)} == {40}


def test_a_terminal_without_unicode_gets_ascii() -> None:
    text = "\n".join(drawn(after(27), encoding="ascii"))
    assert "27/40" in text
    assert "reward" in text


def test_before_the_first_result_the_panel_shows_the_phase_and_its_seconds() -> None:
    seconds = iter(range(0, 1000, 10))
    progress = Progress(name="run", iterations=40, clock=lambda: next(seconds))
    progress.enter("starting 2 rollout replicas")
    lines = drawn(progress)
    assert len(lines) == 3
    assert "starting 2 rollout replicas" in lines[1]
    assert "10 s" in lines[1]


def test_names_are_text_not_markup() -> None:
    progress = Progress(name="[bold]run[/]", iterations=1)
    progress.enter("[red]phase")
    text = "\n".join(drawn(progress))
    assert "[bold]run[/]" in text
    assert "[red]phase" in text


def test_the_plain_line_is_short_ascii() -> None:
    line = plain_line(after(27))
    assert line.startswith("27/40  reward 0.900  held-out 0.770  KL 1.2e-05")
    assert line.isascii()
    assert len(line) <= 100


def test_the_plain_line_shows_an_evaluation_when_it_is_new() -> None:
    progress = after(1)
    assert "held-out" in plain_line(progress)
    progress.record(flatten({"training_iteration": 2, "rollouts": {"reward_mean": 0.25}}))
    assert plain_line(progress) == " 2/40  reward 0.250"


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        ([], 8, ""),
        ([0.0, 1.0], 8, "▁█"),
        ([0.0, 0.5, 1.0], 8, "▁▅█"),
        ([3.0, 3.0], 8, "▁▁"),
        ([0.0, math.nan, 1.0], 8, "▁█"),
        ([0.0, 0.0, 1.0, 1.0], 2, "▁█"),
        ([5.0, 1.0, 9.0, 9.0, 2.0], 2, "▁█"),
    ],
)
def test_sparkline(values: list[float], width: int, expected: str) -> None:
    # The last row: runs [5, 1] and [9, 9, 2] with means 3 and 6.67.
    assert sparkline(values, width) == expected


def test_a_long_sparkline_keeps_to_its_width() -> None:
    assert len(sparkline([float(value) for value in range(1000)], 32)) == 32


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (247, "4:07"), (8000, "2:13:20")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (0.5123, "0.512"),
        (0.0512, "0.0512"),
        (97.34, "97.3"),
        (512.4, "512"),
        (-0.25, "-0.250"),
        (1.2e-5, "1.2e-05"),
        (12345.0, "12.3k"),
        (4.5e6, "4.5M"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_short(number: float, text: str) -> None:
    assert short(number) == text
