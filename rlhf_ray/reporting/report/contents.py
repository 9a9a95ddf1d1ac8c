"""All that the page shows, as one value that JSON can hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_ray.reporting.metrics import Scalar
from rlhf_ray.reporting.report.charts import chart_contents
from rlhf_ray.reporting.report.curves import Curves, read_curves
from rlhf_ray.reporting.report.run import Run
from rlhf_ray.reporting.report.settings import differences, key_settings, shown
from rlhf_ray.reporting.report.tables import read_tables

__all__ = ["report_contents"]

MAX_TOKENS = 120_000
"""Of all completions of the page; a token takes about 25 bytes there."""


def report_contents(runs: Sequence[Run], *, tables: int) -> dict[str, Any]:
    """Gather the page's contents.

    Args:
        runs: At least one.
        tables: Completion tables of each run.
    """
    curves = [read_curves(run.rows) for run in runs]
    charts, missing = chart_contents(key for of_run in curves for key in of_run.values)
    names = _names(runs)
    max_tokens = MAX_TOKENS // max(1, tables * len(runs))
    return {
        "runs": [
            _run_content(name, run, of_run, tables=tables, max_tokens=max_tokens)
            for name, run, of_run in zip(names, runs, curves, strict=True)
        ],
        "charts": charts,
        "missing": missing if any(run.rows for run in runs) else [],
        "differences": differences([run.settings for run in runs]),
    }


def _run_content(name: str, run: Run, curves: Curves, *, tables: int, max_tokens: int) -> dict[str, Any]:
    notes = list(run.notes)
    contents: Sequence[Mapping[str, Any]] = ()
    if tables:
        found = read_tables(run.directory.completions, count=tables, max_tokens=max_tokens)
        contents = found.contents
        notes += found.notes
    if run.rows and not any(key.startswith("evaluation/") for row in run.rows for key in row):
        notes.append("There was no evaluation (evaluation.interval).")
    if curves.rows_per_point > 1:
        notes.append(f"A point of a curve stands for {curves.rows_per_point} iterations.")
    return {
        "name": name,
        "algorithm": run.settings.get("algorithm"),
        "keySettings": key_settings(run.settings),
        "settings": [(key, shown(value)) for key, value in run.settings.items()],
        "results": _results(run),
        "notes": notes,
        "x": {"iteration": curves.iteration, "samples": curves.samples, "seconds": curves.seconds},
        "values": curves.values,
        "tables": contents,
    }


def _results(run: Run) -> dict[str, Any]:
    """The few numbers that a run comes to."""
    last = run.rows[-1] if run.rows else {}
    held_out = dict.fromkeys(
        key for row in run.rows for key in row if key.startswith("evaluation/") and key.endswith("/reward_mean")
    )
    return {
        "iterations": last.get("training_iteration", 0),
        "planned": run.planned_iterations,
        "seconds": last.get("time_total_s"),
        "reward": _course(run, "rollouts/reward_mean"),
        "evaluation": [
            {"name": key.removeprefix("evaluation/").removesuffix("/reward_mean"), **_course(run, key)}
            for key in held_out
        ],
    }


def _course(run: Run, key: str) -> dict[str, Scalar | None]:
    """First, last and best value of a metric, and the iteration of the best; nothing where it has none."""
    points = [
        (value, row["training_iteration"])
        for row in run.rows
        if isinstance(value := row.get(key), (int, float)) and not isinstance(value, bool)
    ]
    if not points:
        return {"first": None, "last": None, "best": None, "bestAt": None}
    best, best_at = max(points, key=lambda point: point[0])
    return {"first": points[0][0], "last": points[-1][0], "best": best, "bestAt": best_at}


def _names(runs: Sequence[Run]) -> list[str]:
    """The folders' names, with those above them as far as it takes to tell the runs apart."""
    paths = [run.directory.path for run in runs]
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]
