"""The report of some run directories, written to a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rlhf_ray.errors import ConfigError
from rlhf_ray.reporting.report.contents import report_contents
from rlhf_ray.reporting.report.page import page
from rlhf_ray.reporting.report.run import Run, read_run

__all__ = ["DEFAULT_TABLES", "write_report"]

DEFAULT_TABLES = 6
_FILE_NAME = "report.html"


def write_report(
    run_dirs: Sequence[str | Path], *, output: str | Path | None = None, completions: int = DEFAULT_TABLES
) -> Path:
    """Write one page about one or several runs.

    Args:
        run_dirs: Run directories, at least one; a run may still be going.
        output: The file; none: ``report.html`` in the run directory, of several runs in the working directory.
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
    _write(path, page(contents, title=f"{', '.join(names)} - rlhf_ray"))
    return path


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


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        unfinished.write_text(text, encoding="utf-8")
        # A browser that reloads the page of a run that goes on must never get half of it.
        os.replace(unfinished, path)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        remedy = f"the file cannot be written ({reason}); choose another place with --output"
        raise ConfigError("--output", str(path), remedy) from error
