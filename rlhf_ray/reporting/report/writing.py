"""The report of some run directories: all that its page shows, as one value that JSON can hold, and its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_ray.errors import ConfigError
from rlhf_ray.reporting.metrics import Scalar, held_out_set
from rlhf_ray.reporting.report.charts import Curves, chart_contents, read_curves
from rlhf_ray.reporting.report.page import page
from rlhf_ray.reporting.report.run import Run, differences, key_settings, read_run, shown
from rlhf_ray.reporting.report.tables import read_tables
from rlhf_ray.reporting.run_directory import write_whole

__all__ = ["DEFAULT_TABLES", "MAX_TOKENS", "report_contents", "write_report"]

DEFAULT_TABLES = 6
_FILE_NAME = "report.html"
MAX_TOKENS = 120_000
"""Of all completions of the page; a token takes about 25 bytes there."""


def write_report(
    run_dirs: Sequence[str | Path], *, output: str | Path | None = None, completions: int = DEFAULT_TABLES
) -> Path:
    """Write one page about one or several runs.

    Args:
        run_dirs: Run directories, at least one; a run may be under way.
        output: The file; unset: ``report.html`` in the run directory, of several runs in the working directory.
        completions: Iterations of each run whose completions the page shows, spread over the run.

    Returns:
        The file, absolute.

    Raises:
        ConfigError: A folder holds no run or is named twice, or the file cannot be written.
    """
    if completions < 0:
        raise ConfigError("--completions", completions, "name a number of iterations; 0 leaves completions out")
    runs = _distinct([(str(path), read_run(path)) for path in run_dirs])
    path = _output_path(output, runs)
    contents = report_contents(runs, tables=completions)
    names = [run["name"] for run in contents["runs"]]
    try:
        # A browser that reloads the page of a run under way must never get half of it.
        write_whole(path, page(contents, title=f"{', '.join(names)} - rlhf_ray"))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        remedy = f"the file cannot be written ({reason}); choose another place with --output"
        raise ConfigError("--output", str(path), remedy) from error
    return path


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
    """The few numbers that summarize a run."""
    last = run.rows[-1] if run.rows else {}
    held_out = {key: name for row in run.rows for key in row if (name := held_out_set(key))}
    return {
        "iterations": last.get("training_iteration", 0),
        "planned": run.settings.get("training.iterations"),
        "seconds": last.get("time_total_s"),
        "reward": _course(run, "rollouts/reward_mean"),
        "evaluation": [{"name": name, **_course(run, key)} for key, name in held_out.items()],
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
    """The folders' names, with as many parent folders as distinguish the runs."""
    paths = [run.directory.path for run in runs]
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def _distinct(named: Sequence[tuple[str, Run]]) -> list[Run]:
    runs: dict[Path, Run] = {}
    for name, run in named:
        if run.directory.path in runs:
            raise ConfigError("RUN_DIR", name, "this run is named twice; name each once")
        runs[run.directory.path] = run
    if not runs:
        raise ConfigError("RUN_DIR", None, "name the folder of a run")
    return list(runs.values())


def _output_path(output: str | Path | None, runs: Sequence[Run]) -> Path:
    if output is None:
        return (runs[0].directory.path if len(runs) == 1 else Path.cwd()) / _FILE_NAME
    path = Path(output).expanduser().absolute()
    if path.is_dir():
        raise ConfigError("--output", str(output), f"it is a folder; name a file, for example {path / _FILE_NAME}")
    return path
