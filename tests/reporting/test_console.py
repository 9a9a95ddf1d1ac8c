from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from rlhf_ray.config.settings import ReportingSettings, Settings
from rlhf_ray.reporting import RunDirectory, flatten
from rlhf_ray.reporting.console import ConsoleReporter, resolve_mode


def with_progress(progress: str) -> Settings:
    return replace(Settings(), reporting=ReportingSettings(progress=progress))  # type: ignore[arg-type]


def shown(progress: str, run_dir: RunDirectory, result: dict[str, Any], *, terminal: bool) -> str:
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=terminal, color_system=None)
    reporter = ConsoleReporter(with_progress(progress), run_dir, console)
    reporter.phase("starting 1 rollout replica")
    reporter.report(flatten(result))
    reporter.stop()
    return file.getvalue()


@pytest.mark.parametrize(
    ("progress", "terminal", "prompt", "mode"),
    [
        ("auto", True, False, "live"),
        ("auto", False, False, "off"),
        ("auto", True, True, "off"),
        ("live", True, True, "live"),
        ("live", False, False, "plain"),
        ("plain", True, False, "plain"),
        ("plain", False, False, "plain"),
        ("off", True, False, "off"),
    ],
)
def test_the_mode_follows_setting_and_terminal(progress: str, terminal: bool, prompt: bool, mode: str) -> None:
    assert resolve_mode(progress, terminal=terminal, prompt=prompt) == mode


def test_plain_is_one_line_per_phase_and_iteration(run_dir: RunDirectory, result: dict[str, Any]) -> None:
    lines = shown("plain", run_dir, result, terminal=False).splitlines()
    assert lines == [
        "[  0 s] starting 1 rollout replica",
        "  3/100  reward 0.500  held-out 0.750  KL 0.00123  length 4.25  5123 tok/s  1.50 s",
    ]


def test_a_plain_line_is_never_wrapped(run_dir: RunDirectory, result: dict[str, Any]) -> None:
    file = io.StringIO()
    reporter = ConsoleReporter(with_progress("plain"), run_dir, Console(file=file, width=40))
    reporter.report(flatten(result))
    assert len(file.getvalue().splitlines()) == 1


def test_live_draws_a_panel_and_leaves_the_last_one(run_dir: RunDirectory, result: dict[str, Any]) -> None:
    text = shown("live", run_dir, result, terminal=True)
    last = text[text.rindex("╭") :]
    assert "3/100" in last
    assert "held-out" in last
    assert text.rstrip("\n").endswith(("╯", "\x1b[?25h"))  # the cursor is back


def test_off_shows_nothing(run_dir: RunDirectory, result: dict[str, Any]) -> None:
    assert shown("off", run_dir, result, terminal=True) == ""
    assert shown("auto", run_dir, result, terminal=False) == ""
