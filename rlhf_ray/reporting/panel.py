"""A run's progress as a live panel or as one plain line."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlhf_ray.reporting.progress import Progress

__all__ = ["ProgressPanel", "duration", "plain_line", "short", "sparkline"]

_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII_BLOCKS = "_.,-=+*#"
_CURVE_WIDTH = 32


def sparkline(values: Sequence[float], width: int, *, blocks: str = _BLOCKS) -> str:
    """Draw a curve in one line of text.

    Args:
        values: Oldest first; more than ``width`` of them are averaged in equal runs. Non-finite ones are left out.
        width: Characters at most.
        blocks: Characters from low to high.
    """
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) > width:
        edges = [round(index * len(finite) / width) for index in range(width + 1)]
        finite = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    if span == 0:
        return blocks[0] * len(finite)
    top = len(blocks) - 1
    return "".join(blocks[round((value - low) / span * top)] for value in finite)


def duration(seconds: float) -> str:
    """Write a time as ``48 s``, ``4:07`` or ``2:13:20``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"


def short(number: float) -> str:
    """Write a number with about three digits: ``0.0512``, ``97.3``, ``512``, ``12.3k``, ``1.2e-05``."""
    size = abs(number)
    if not math.isfinite(number):
        return str(number)
    if size >= 1e4:
        scale, letter = (1e6, "M") if size >= 1e6 else (1e3, "k")
        return f"{number / scale:.1f}{letter}"
    if size >= 100 or number.is_integer():
        return f"{number:.0f}"
    return f"{number:#.3g}" if size >= 1e-3 else f"{number:.1e}"


def plain_line(progress: Progress) -> str:
    """Write the newest result as one line of ASCII for logs."""
    environments = progress.environments
    fields = [
        ("reward ", "rollouts/reward_mean", ""),
        *((f"{name} ", f"environment/{name}/reward_mean", "") for name in environments),
        *(("held-out ", f"evaluation/{name}/reward_mean", "") for name in progress.evaluations),
        ("KL ", "learner/approx_kl", ""),
        ("length ", "rollouts/completion_tokens_mean", ""),
        *([("turns ", "rollouts/turns_mean", "")] if environments else []),
        ("", "rollouts/tokens_per_s", " tok/s"),
        ("", "timers/iteration_s", " s"),
    ]
    numbers = ((before, progress.number(key), after) for before, key, after in fields)
    shown = "  ".join(f"{before}{short(number)}{after}" for before, number, after in numbers if number is not None)
    width = len(str(progress.iterations))
    return f"{progress.iteration:{width}d}/{progress.iterations}  {shown}"


class ProgressPanel:
    """Rich renderable: the state of a run in a box that fits 80 columns; redrawn at each refresh."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the box for this console."""
        blocks = _ASCII_BLOCKS if options.ascii_only else _BLOCKS
        rows = [_phase(self._progress)]
        if self._progress.row:
            rows = [_header(self._progress), *rows, _numbers(self._progress, blocks)]
        yield Panel(Group(*rows), title=Text(self._progress.name), title_align="left", border_style="cyan")


def _header(progress: Progress) -> RenderableType:
    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column(ratio=1, no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    bar = ProgressBar(total=progress.iterations, completed=progress.iteration)
    left = f", {duration(progress.remaining_s)} left" if progress.remaining_s else ""
    grid.add_row(f"{progress.iteration}/{progress.iterations}", bar, f"{duration(progress.elapsed_s)}{left}")
    return grid


def _phase(progress: Progress) -> RenderableType:
    grid = Table.grid(expand=True)
    grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    grid.add_column(justify="right", no_wrap=True)
    grid.add_row(Text(progress.phase, style="dim" if progress.row else "bold"), duration(progress.phase_s))
    return grid


def _numbers(progress: Progress, blocks: str) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="cyan", no_wrap=True, min_width=8)
    grid.add_column(overflow="ellipsis")
    for name, curve in _curves(progress):
        drawn = f"{short(curve[-1]):<7} {sparkline(curve, _CURVE_WIDTH, blocks=blocks)}  from {short(curve[0])}"
        grid.add_row(Text(name), Text(drawn, no_wrap=True))
    rows: defaultdict[str, list[str]] = defaultdict(list)
    for name, label, key, write in _NUMBERS:
        if (number := progress.number(key)) is not None:
            rows[name].append(f"{label} {write(number)}")
    for name, shown in rows.items():
        grid.add_row(name, Text("  ".join(shown), no_wrap=True))
    for name in progress.environments:
        written = ((label, progress.number(f"environment/{name}/{key}")) for label, key in _OF_ENVIRONMENT)
        shown = [f"{label} {short(number)}" for label, number in written if number is not None]
        grid.add_row(Text(name[-16:]), Text("  ".join(shown), no_wrap=True))
    if troubles := _troubles(progress):
        grid.add_row(Text("faults", style="yellow"), Text(troubles, style="yellow"))
    return grid


def _curves(progress: Progress) -> Iterator[tuple[str, Sequence[float]]]:
    if progress.rewards:
        yield "reward", progress.rewards
    several = len(progress.evaluations) > 1
    for name, curve in progress.evaluations.items():
        yield (name[-16:] if several else "held-out"), curve


def _seconds(number: float) -> str:
    return f"{number:.2f}" if number < 10 else f"{number:.0f}"


_NUMBERS: tuple[tuple[str, str, str, Callable[[float], str]], ...] = (
    ("policy", "KL", "learner/approx_kl", short),
    ("policy", "clipped", "learner/clip_fraction", "{:.1%}".format),
    ("policy", "entropy", "learner/entropy", short),
    ("policy", "grad norm", "learner/grad_norm", short),
    ("critic", "loss", "learner/value_loss", short),
    ("critic", "explained variance", "learner/explained_variance", short),
    ("length", "mean", "rollouts/completion_tokens_mean", short),
    ("length", "max", "rollouts/completion_tokens_max", short),
    ("length", "truncated", "rollouts/truncated_fraction", "{:.1%}".format),
    ("tokens/s", "sampled", "rollouts/tokens_per_s", short),
    ("tokens/s", "trained", "learner/tokens_per_s", short),
    ("seconds", "rollout", "timers/rollout_s", _seconds),
    ("seconds", "reward", "timers/reward_s", _seconds),
    ("seconds", "advantage", "timers/advantage_s", _seconds),
    ("seconds", "update", "timers/update_s", _seconds),
    ("seconds", "sync", "timers/weight_sync_s", _seconds),
    ("seconds", "all", "timers/iteration_s", _seconds),
)
"""Row of the panel, label, key, and how its number is written."""


_OF_ENVIRONMENT = (("reward", "reward_mean"), ("turns", "steps_mean"), ("seconds per step", "step_s"))
"""Label and key in the row of an environment."""


def _troubles(progress: Progress) -> str:
    counts = (
        ("reward failures", "rewards/failures/"),
        ("groups resent", "fault_tolerance/group_retries"),
        ("replica restarts", "fault_tolerance/replica_restarts"),
        ("learner restarts", "fault_tolerance/learner_restarts"),
        ("rewinds", "fault_tolerance/rewinds"),
        ("reporter failures", "reporting/failures"),
    )
    totals = [(name, progress.total(prefix)) for name, prefix in counts]
    totals.insert(1, ("environment failures", progress.environment_failures))
    return "  ".join(f"{name} {total:.0f}" for name, total in totals if total)
