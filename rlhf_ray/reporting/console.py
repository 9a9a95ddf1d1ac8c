"""The run on the console, as a live panel or as plain lines."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Literal

import rich
from rich.console import Console
from rich.live import Live

from rlhf_ray.config.settings import Settings
from rlhf_ray.reporting.metrics import Scalar
from rlhf_ray.reporting.panel import ProgressPanel, duration, plain_line
from rlhf_ray.reporting.progress import Progress
from rlhf_ray.reporting.reporter import Reporter
from rlhf_ray.reporting.run_directory import RunDirectory

__all__ = ["ConsoleReporter", "resolve_mode"]

Mode = Literal["live", "plain", "off"]


def resolve_mode(progress: str, *, terminal: bool, prompt: bool) -> Mode:
    """Decide how a run shows itself.

    Args:
        progress: ``reporting.progress``.
        terminal: Whether the output is a terminal that can redraw.
        prompt: Whether Python itself reads from the terminal (REPL, ``python -i``), where redrawing would fight with
            what is typed.

    Returns:
        ``auto`` is ``live`` where that can be drawn, else ``off``: a script's output is the script's own. ``live``
        asked for without a terminal is ``plain``, because a redrawn panel in a file is unreadable.
    """
    if progress == "auto":
        return "live" if terminal and not prompt else "off"
    if progress == "live":
        return "live" if terminal else "plain"
    return "plain" if progress == "plain" else "off"


class ConsoleReporter(Reporter):
    """Shows the phase of the start-up with its seconds, then the newest numbers of the run.

    Args:
        settings: Of the run.
        run_dir: Of the run.
        console: Where to draw; unset: rich's global console, so that what is printed through it while the panel is up
            (``rich.print`` too) appears above the panel.
    """

    def __init__(self, settings: Settings, run_dir: RunDirectory, console: Console | None = None) -> None:
        self._console = console or rich.get_console()
        self._mode = resolve_mode(
            settings.reporting.progress,
            terminal=self._console.is_terminal and not self._console.is_dumb_terminal,
            prompt=hasattr(sys, "ps1") or bool(sys.flags.interactive),
        )
        self._progress = Progress(name=run_dir.name, iterations=settings.training.iterations)
        self._live = Live(ProgressPanel(self._progress), console=self._console, refresh_per_second=4)
        if self._mode == "live":
            self._live.start()

    def phase(self, text: str) -> None:
        """Show what the run is busy with."""
        self._progress.enter(text)
        self._print(f"[{duration(self._progress.elapsed_s):>5}] {text}")

    def report(self, row: Mapping[str, Scalar]) -> None:
        """Show the iteration's numbers."""
        self._progress.record(row)
        self._print(plain_line(self._progress))

    def stop(self) -> None:
        """Leave the last panel on the console and give the console back."""
        self._live.stop()

    def _print(self, text: str) -> None:
        # Logs are read by other programs too: no colors, and no line breaks at a width that a file does not have.
        if self._mode == "plain":
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
